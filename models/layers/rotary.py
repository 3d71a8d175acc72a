"""Rotary positions (Su et al. 2021, equation 34), layout "half": dims (i, i + h/2) form a pair.

The tables are computed in every forward, once for all layers: a few thousand sines, and no buffer that a
model built on the meta device could lose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["apply_rotary", "rotary_tables"]


def rotary_tables(
    positions: Tensor, head_width: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of t * theta^(-2i/h) for positions (T,), each (T, 1, h/2), in at least fp32."""
    dtype = at_least_fp32(dtype)
    exponents = torch.arange(0, head_width, 2, device=positions.device, dtype=dtype) / head_width
    angles = positions.to(dtype)[:, None] * theta**-exponents  # (T, h/2)
    return angles.cos()[:, None], angles.sin()[:, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of x (B, T, heads, h) by its angle; computed in the tables' dtype, returned in x's."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
