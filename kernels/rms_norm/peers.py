"""RMSNorm as others compute it, for the benchmark."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["of_liger", "of_quack", "of_torch"]


def of_torch(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, *, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """torch's own fused operation, in the dtype of x."""
    total = x if branch is None else x + branch
    return (None if branch is None else total), F.rms_norm(total, x.shape[-1:], weight, eps)


def of_liger(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, *, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """liger-kernel's."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if branch is None:
        return None, LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
    y, total = LigerFusedAddRMSNormFunction.apply(x, branch, weight, eps, 0.0, "llama", False)
    return total, y


def of_quack(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, *, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """QuACK's."""
    from quack.rmsnorm import rmsnorm

    if branch is None:
        return None, rmsnorm(x, weight, eps=eps)
    y, total = rmsnorm(x, weight, residual=branch, eps=eps, prenorm=True)
    return total, y
