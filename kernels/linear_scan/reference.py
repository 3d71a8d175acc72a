"""The definition, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["reference"]


def reference(x: Tensor, decay: Tensor, initial: Tensor | None) -> Tensor:
    """x (B, T, D), decay (B, T), initial (B, D) or None -> y (B, T, D) with y_t = decay_t y_{t-1} + x_t."""
    exact = at_least_fp32(x.dtype)
    y = x.new_zeros(x.shape[0], x.shape[2], dtype=exact) if initial is None else initial.to(exact)
    found = []
    for now, left in zip(x.to(exact).unbind(1), decay.to(exact).unbind(1), strict=True):
        y = left[:, None] * y + now
        found.append(y)
    return torch.stack(found, dim=1).to(x.dtype)
