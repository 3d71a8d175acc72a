"""Bounds on logits: smooth, increasing functions that cannot leave an interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SigmoidCap", "Softcap", "TanhCap"]


@dataclass(frozen=True)
class TanhCap:
    """c tanh(z / c), within (-c, c) (Gemma 2, arXiv:2408.00118, section 2)."""

    c: float

    def __post_init__(self) -> None:
        _positive(c=self.c)

    def __call__(self, z: Tensor) -> Tensor:
        return self.c * torch.tanh(z / self.c)

    def slope(self, capped: Tensor) -> Tensor:
        """d cap / d z, from the capped values."""
        return 1 - (capped / self.c).square()

    @property
    def as_sigmoid(self) -> list[float]:
        """a, b, c, d of the same function as a sigmoid((z + b) / c) + d."""
        return [2 * self.c, 0.0, self.c / 2, -self.c]


@dataclass(frozen=True)
class SigmoidCap:
    """a sigmoid((z + b) / c), within (0, a) (modded-nanogpt)."""

    a: float
    b: float
    c: float

    def __post_init__(self) -> None:
        _positive(a=self.a, c=self.c)

    def __call__(self, z: Tensor) -> Tensor:
        return self.a * torch.sigmoid((z + self.b) / self.c)

    def slope(self, capped: Tensor) -> Tensor:
        """d cap / d z, from the capped values."""
        return capped * (1 - capped / self.a) / self.c

    @property
    def as_sigmoid(self) -> list[float]:
        """a, b, c, d of the same function as a sigmoid((z + b) / c) + d."""
        return [self.a, self.b, self.c, 0.0]


Softcap = TanhCap | SigmoidCap


def _positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise ValueError(f"softcap: {name} must be a positive number, got {number}")
