"""The definition of a vector's direction."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["reference"]


def reference(x: Tensor) -> Tensor:
    """x (..., D) -> like x; computed in at least fp32."""
    return F.normalize(x.to(at_least_fp32(x.dtype)), dim=-1).to(x.dtype)
