"""The definition of LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["reference"]


def reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """x and branch (..., D), weight and bias (D,), or (G, 1, D) to each group its own -> x + branch (None without a
    branch), its norm (..., D) in `out_dtype`; statistics in at least fp32."""
    total = x if branch is None else x + branch
    stats = at_least_fp32(total.dtype)
    gain, shift = weight.to(stats), None if bias is None else bias.to(stats)
    if weight.ndim == 1:
        y = F.layer_norm(total.to(stats), weight.shape, gain, shift, eps)
    else:
        y = F.layer_norm(total.to(stats), total.shape[-1:], eps=eps)
        y = y * gain if shift is None else torch.addcmul(shift, y, gain)
    return (None if branch is None else total), y.to(out_dtype)
