"""Numbers per token that a small network makes of a state (Xiao et al. 2025, MUDDFormer, arXiv:2502.12170, section 3.2,
without its own depths): strengths of what is added to the residual stream, and mixes of earlier states.

Shapes: B rows, T tokens, D width, n numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import at_least_fp32
from models.layers.init import uniform_

__all__ = ["SCALE", "Gates", "Mudd", "Wanted"]

HIDDEN = 64
SCALE = 0.1  # s: the smaller it is, the further a step of Adam moves what lies behind it


class Mudd(nn.Module):
    """s (W_2 gelu(W_1 x) + b): x (B, T, D) -> (B, T, n), in at least fp32. It begins as `starts`, whatever x."""

    def __init__(self, width: int, starts: Sequence[float]) -> None:
        super().__init__()
        self.starts = tuple(starts)
        self.up = nn.Linear(width, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, len(self.starts))

    def forward(self, x: Tensor, scale: Tensor | float = SCALE) -> Tensor:
        y = F.linear(F.gelu(self.up(x)), self.down.weight)
        return scale * (y.to(at_least_fp32(y.dtype)) + self.down.bias)

    def init_weights(self, generator: torch.Generator) -> None:
        uniform_(self.up.weight, (3 * self.up.in_features) ** -0.5, generator)
        nn.init.zeros_(self.down.weight)
        _fill(self.down.bias, [start / SCALE for start in self.starts])


class Wanted(NamedTuple):
    """`numbers` of a kind that a layer is to have per token, and where they begin."""

    kind: str
    layer: int
    numbers: int
    start: float


class Gates(nn.Module):
    """What several layers want of one state, by layer and kind, each (B, T, numbers). Where they are not `dynamic` they
    are learned numbers that are the same for all tokens, (numbers,)."""

    def __init__(self, width: int, wanted: Sequence[Wanted], dynamic: bool) -> None:
        super().__init__()
        self.wanted = tuple(wanted)
        self.starts = [want.start for want in self.wanted for _ in range(want.numbers)]
        self.mudd = Mudd(width, self.starts) if dynamic else None
        self.fixed = None if dynamic else nn.Parameter(torch.empty(len(self.starts)))

    def forward(self, x: Tensor, scale: Tensor | None) -> dict[int, dict[str, Tensor]]:
        if self.mudd is not None:
            assert scale is not None
            found = self.mudd(x, scale)
        else:
            assert self.fixed is not None
            found = self.fixed
        parts = found.split([want.numbers for want in self.wanted], dim=-1)
        by_layer: dict[int, dict[str, Tensor]] = {}
        for want, part in zip(self.wanted, parts, strict=True):
            by_layer.setdefault(want.layer, {})[want.kind] = part
        return by_layer

    def init_weights(self, generator: torch.Generator) -> None:
        if self.mudd is not None:
            self.mudd.init_weights(generator)
        elif self.fixed is not None:
            _fill(self.fixed, self.starts)


@torch.no_grad()
def _fill(parameter: nn.Parameter, values: Sequence[float]) -> None:
    if not parameter.is_meta:
        parameter.copy_(torch.tensor(values, dtype=torch.float64))
