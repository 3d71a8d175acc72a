"""LayerNorm as others compute it, for the benchmark."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["of_liger", "of_torch"]


def of_torch(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """torch's own fused operation, in the dtype of x; groups by a second one."""
    total = x if branch is None else x + branch
    summed = None if branch is None else total
    if weight.ndim == 1:
        return summed, F.layer_norm(total, weight.shape, weight, bias, eps)
    y = F.layer_norm(total, total.shape[-1:], eps=eps)
    return summed, y * weight if bias is None else torch.addcmul(bias, y, weight)


def of_liger(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """liger-kernel's, which always has a bias, and one weight for all rows: groups by a second operation."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    total = x if branch is None else x + branch
    summed = None if branch is None else total
    if weight.ndim == 1:
        shift = torch.zeros_like(weight) if bias is None else bias
        return summed, LigerLayerNormFunction.apply(total, weight, shift, eps)
    ones, zeros = weight.new_ones(weight.shape[-1]), weight.new_zeros(weight.shape[-1])
    y = LigerLayerNormFunction.apply(total, ones, zeros, eps)
    return summed, y * weight if bias is None else torch.addcmul(bias, y, weight)
