"""Chunks of one length, each made of all that it holds: the baseline H-Net (pool) of a hierarchy with sparse attention.

    v_j = W_2 relu(W_1 [x_{jN}; ...; x_{jN+N-1}] + b_1) + b_2

The code that hnet_x_nsa follows (HP2706/modded-nanogpt, `models/hnet_x_nsa.py`) makes chunks so, with a hidden width of
four times what goes in; there every place of a chunk is told of the whole chunk. Here a chunk is there once its last
place is: v_j goes through the stage within, and what comes out reaches places (j + 1) N - 1 and those behind, up to
where the next chunk is there. Places before a document's first chunk is whole are told nothing, and the rest behind its
last whole chunk is in none. That code widens a chunk by another MLP to a vector for each of its places; here all places
that it reaches are told the same, as in H-Net, and nothing is smoothed, as no router was in doubt. Of several stages
each does so with the chunks of the one around it, so that the innermost chunk of n bytes reaches bytes (j + 1) n - 1
and those behind.

Shapes: R rows, M places, C chunks, N places of a chunk, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.upsample import taken
from models.hierarchy.places import EMPTY, ByRow, Places
from models.layers.init import INIT_STD, normal_

__all__ = ["Pooling", "one_empty"]

EXPANSION = 4  # hidden width / what goes in


class Pooling(nn.Module):
    """relu between two matrices with biases."""

    def __init__(self, width: int, every: int) -> None:
        super().__init__()
        self.every, read = every, every * width
        self.up = nn.Linear(read, EXPANSION * read)
        self.down = nn.Linear(EXPANSION * read, width)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (R, M, D), ends (R, C) int64, the last place of each chunk -> (R, C, D)"""
        held = self.held(ends)
        x = taken(x, held.flatten(1)).unflatten(1, held.shape[1:]).flatten(2)  # (R, C, N D)
        return self.down(F.relu(self.up(x)))

    def held(self, ends: Tensor) -> Tensor:
        """(R, C) -> (R, C, N): all places of each chunk. Of empty ones what these are does not matter."""
        return (ends[..., None] + torch.arange(1 - self.every, 1, device=ends.device)).clamp(min=0)

    @property
    def weights(self) -> int:
        """Numbers in its matrices: what one chunk is multiplied with."""
        return self.up.weight.numel() + self.down.weight.numel()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Matrices N(0, 0.02^2) as all of H-Net's, biases 0."""
        for layer in (self.up, self.down):
            normal_(layer.weight, INIT_STD, generator)
            nn.init.zeros_(layer.bias)


def one_empty(places: Places, packed: bool) -> tuple[Places, Tensor]:
    """Of `places` whose documents are all shorter than a chunk: the places of chunks, one that is empty (in each row
    unless packed), so that no stage within has to do without any; and `source`, as `Places.chunks`."""
    batch = len(places.in_rows[0])
    rows = 1 if packed else batch
    source = places.bytes.new_zeros(rows, 1)
    nothing = torch.zeros(batch, 1, dtype=torch.bool, device=source.device)
    by_row = ByRow(source.new_zeros(batch, 1), nothing, source.new_zeros(1)) if packed else None
    empty = Places(source + EMPTY, source, nothing[:rows], by_row, places.longest, places.bucket)
    return empty, source
