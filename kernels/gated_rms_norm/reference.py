"""The definition of a gated normalisation, in torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["reference"]


def reference(y: Tensor, z: Tensor, weight: Tensor, *, groups: int, eps: float) -> Tensor:
    """y and z (..., D), weight (D,) -> (..., D) in y's dtype, computed in at least fp32."""
    exact = at_least_fp32(y.dtype)
    gated = (y.to(exact) * F.silu(z.to(exact))).unflatten(-1, (groups, -1))
    normed = gated * (gated.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed.flatten(-2) * weight.to(exact)).to(y.dtype)
