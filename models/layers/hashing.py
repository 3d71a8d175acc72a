"""Numbers that look random, as a function of a seed per row and a place: inside a network, on its device.

Computed twice (recompute, a compiler's own choice of what to keep) they are the same, which those of a generator are
not. `adapters/randomness.py` makes the seeds.

Shapes: B rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["LayerNoise", "hashed_normal", "hashed_uniform"]

_STEP = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class LayerNoise(nn.Module):
    """`hashed_uniform` of a layer's own stream. Its number is a tensor: what is compiled for a block holds the integers
    that it reads, and blocks that differ in one alone would each be compiled anew, and from the ninth on not at all."""

    stream: Tensor

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("stream", torch.tensor(layer), persistent=False)

    def forward(self, row_seeds: Tensor, number: int, first: int = 0) -> Tensor:
        return hashed_uniform(row_seeds, self.stream, number, first)

    def init_weights(self) -> None:
        self.stream.fill_(self.layer)


def hashed_uniform(row_seeds: Tensor, stream: int | Tensor, number: int, first: int = 0) -> Tensor:
    """(B, number) fp32 in (0, 1) for seeds (B,) int64: SplitMix64 (Steele et al. 2014), from the place `first` on of a
    sequence for each stream >= 0, also as (), of each row."""
    bits = _bits(row_seeds, stream, first, number)
    return (_shifted(bits, 41).to(torch.float32) + 0.5) * 2.0**-23  # 23 bits: 1 is out of reach


def hashed_normal(row_seeds: Tensor, stream: int, first: int, number: int, bound: float) -> Tensor:
    """(B, number) fp32, N(0, 1) cut off at +-`bound`: the numbers from the place `first` on of a sequence for each
    stream >= 0 of each row, both even, as one hash makes two."""
    assert first % 2 == number % 2 == 0
    halves = _bits(row_seeds, stream, first // 2, number // 2).view(torch.int32)  # (B, number)
    inside = math.erf(bound / math.sqrt(2)) * 2.0**-31  # of the law that is cut off
    return math.sqrt(2) * torch.erfinv((halves.to(torch.float32) + 0.5) * inside)


def _bits(row_seeds: Tensor, stream: int | Tensor, first: int, number: int) -> Tensor:
    """(B, number) int64, all bits of which look random."""
    starts = _mixed(_mixed(row_seeds) + stream)
    places = torch.arange(first + 1, first + number + 1, device=row_seeds.device)
    return _mixed(starts[:, None] + _STEP * places)


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FACTORS[0]
    z = (z ^ _shifted(z, 27)) * _FACTORS[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Without the sign: the high bits become zero."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
