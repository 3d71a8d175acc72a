"""The definition."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.upsample.reference import taken

__all__ = ["reference"]


def reference(x: Tensor, p: Tensor, opens: Tensor, source: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """x (R, M, D), p, opens and chunk (R, M), source (R, C) -> z (R, C, D), P (R, C)."""
    order = torch.arange(source.shape[1], device=source.device)
    there = order < opens.sum(1, keepdim=True)  # (R, C)
    return taken(x, source).where(there[..., None], 0), taken(p, source).where(there, 0)
