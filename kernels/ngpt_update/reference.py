"""The definition of nGPT's step from one hidden state to the next."""

from __future__ import annotations

from torch import Tensor

from kernels.precision import at_least_fp32
from kernels.unit_norm.reference import reference as unit_norm

__all__ = ["reference"]


def reference(h: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
    """h and branch (..., D), alpha (D,) -> like h; computed in at least fp32."""
    stats = at_least_fp32(h.dtype)
    wide = h.to(stats)
    step = alpha.to(stats) * (unit_norm(branch.to(stats)) - wide)
    return unit_norm(wide + step).to(h.dtype)
