"""Angles of rotary positions (Su et al. 2021, equation 34); kernels/qk_norm_rope turns by them.

The tables are computed in every forward, once for all layers: a few thousand sines, and no buffer that a
model built on the meta device could lose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["rotary_tables"]


def rotary_tables(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of t * theta^(-2i/r) for positions t, (T,) or (B, T), and the first r = `width` dims of a head,
    each (T, 1, r/2) or (B, T, 1, r/2), in at least fp32."""
    dtype = at_least_fp32(dtype)
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=dtype) / width
    angles = positions.to(dtype)[..., None] * theta**-exponents  # (..., T, r/2)
    return angles.cos()[..., None, :], angles.sin()[..., None, :]
