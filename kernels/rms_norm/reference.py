"""The definition of RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["reference"]


def reference(x: Tensor, weight: Tensor | None, *, eps: float, out_dtype: torch.dtype) -> Tensor:
    """x (..., D), weight (D,) or None -> (..., D) in `out_dtype`; statistics in at least fp32."""
    stats = at_least_fp32(x.dtype)
    gain = None if weight is None else weight.to(stats)
    return F.rms_norm(x.to(stats), x.shape[-1:], gain, eps).to(out_dtype)
