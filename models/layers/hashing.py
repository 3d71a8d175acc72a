"""Numbers that look random, as a function of a seed per row and a place: inside a network, on its device.

Computed twice (recompute, a compiler's own choice of what to keep) they are the same, which those of a generator are
not. `adapters/randomness.py` makes the seeds.

Shapes: B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hashed_uniform"]

_STEP = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hashed_uniform(row_seeds: Tensor, stream: int, number: int) -> Tensor:
    """(B, number) fp32 in (0, 1) for seeds (B,) int64: SplitMix64 (Steele et al. 2014), a sequence for each stream >= 0
    of each row."""
    starts = _mixed(_mixed(row_seeds) + stream)
    places = torch.arange(1, number + 1, device=row_seeds.device)
    bits = _mixed(starts[:, None] + _STEP * places)
    return (_shifted(bits, 41).to(torch.float32) + 0.5) * 2.0**-23  # 23 bits: 1 is out of reach


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FACTORS[0]
    z = (z ^ _shifted(z, 27)) * _FACTORS[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Without the sign: the high bits become zero."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
