"""The definition."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["reference", "taken"]


def reference(z: Tensor, chunk: Tensor, scale: Tensor, residual: Tensor, *, dtype: torch.dtype) -> Tensor:
    """z (R, C, D), chunk and scale (R, M), residual (R, M, D) -> (R, M, D) in `dtype`."""
    exact = at_least_fp32(z.dtype)
    return (scale.to(exact)[..., None] * taken(z.to(exact), chunk) + residual.to(exact)).to(dtype)


def taken(x: Tensor, index: Tensor) -> Tensor:
    """x (R, M, ...) at index (R, C) -> (R, C, ...)"""
    if len(x) == 1:
        return x[0][index]
    return x[torch.arange(len(x), device=x.device)[:, None], index]
