"""RMSNorm as others compute it, for the benchmark."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["of_liger", "of_torch"]


def of_torch(x: Tensor, weight: Tensor | None, *, eps: float, out_dtype: torch.dtype) -> Tensor:
    """torch's own fused operation, in the dtype of x."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def of_liger(x: Tensor, weight: Tensor | None, *, eps: float, out_dtype: torch.dtype) -> Tensor:
    """liger-kernel's."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
