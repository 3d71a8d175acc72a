"""The definition of RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["reference"]


def reference(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, *, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """x and branch (..., D), weight (D,) -> x + branch (None without a branch), its norm (..., D) in `out_dtype`;
    statistics in at least fp32."""
    total = x if branch is None else x + branch
    stats = at_least_fp32(total.dtype)
    gain = None if weight is None else weight.to(stats)
    y = F.rms_norm(total.to(stats), total.shape[-1:], gain, eps).to(out_dtype)
    return (None if branch is None else total), y
