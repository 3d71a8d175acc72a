"""Summaries of blocks of keys or of values: learned ones (Yuan et al. 2025, equation 7), or means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.init import normal_
from models.sparse.blocks import block_starts

__all__ = ["Mean", "Summary"]


class Summary(nn.Module):
    """An MLP over the tokens of a block, each with its place in the block added; shared by the groups but for places.

    Blocks of `size` tokens begin every `stride` tokens of a document. ValueError where stride does not divide size.
    """

    def __init__(self, width: int, hidden: int, groups: int, size: int, stride: int) -> None:
        super().__init__()
        if stride < 1 or size % stride:
            raise ValueError(
                f"blocks of {size} tokens cannot begin every {stride}: a divisor of {size} is needed"
            )
        self.size, self.stride = size, stride
        self.places = nn.Parameter(torch.empty(groups, size, width))
        self.up = nn.Linear(size * width, hidden)
        self.down = nn.Linear(hidden, width)

    def init_weights(self, generator: torch.Generator) -> None:
        for layer in (self.up, self.down):
            normal_(layer.weight, layer.in_features**-0.5, generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.places)

    def forward(self, x: Tensor, begin: Tensor, starts: Tensor) -> Tensor:
        """(B, N, G, h) summaries of the blocks at `starts` (B, N) of `block_starts`; of -1, any finite numbers.

        x (B, T, G, h); begin (B, T) int64: position of the first token of each token's document.
        """
        rows, _, groups, width = x.shape
        pieces = self.size // self.stride
        # Tokens of blocks that overlap are multiplied stride by stride, so that none is copied once for each block.
        strides = block_starts(begin, self.stride, self.stride)  # (B, C)
        row = torch.arange(rows, device=x.device)[:, None, None]
        inside = torch.arange(self.stride, device=x.device)
        tokens = x[row, strides.clamp(min=0)[:, :, None] + inside]  # (B, C, stride, G, h)
        tokens = tokens.transpose(2, 3).flatten(3)  # (B, C, G, stride * h)
        weight = self.up.weight.unflatten(1, (pieces, self.stride * width))
        products = torch.einsum("bcgx,orx->bcrgo", tokens, weight)
        first = torch.searchsorted(
            strides.masked_fill(strides < 0, x.shape[1]), starts.clamp(min=0)
        )  # (B, N)
        of_block = first[:, :, None] + torch.arange(pieces, device=x.device)
        of_block = of_block.clamp(max=max(0, strides.shape[1] - 1))
        hidden = products[row, of_block, torch.arange(pieces, device=x.device)].sum(2)  # (B, N, G, o)
        # Places are the same in every block: their product is a bias of each group.
        hidden = hidden + F.linear(self.places.flatten(1), self.up.weight, self.up.bias)
        out: Tensor = self.down(F.gelu(hidden))
        return out


class Mean(nn.Module):
    """The mean over a block's tokens, of blocks of `size` that do not overlap: without weights. Not what the paper
    describes, but what `fla` computes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def init_weights(self, generator: torch.Generator) -> None:
        """Nothing to draw."""

    def forward(self, x: Tensor, begin: Tensor, starts: Tensor) -> Tensor:
        """As of `Summary`."""
        row = torch.arange(len(x), device=x.device)[:, None, None]
        inside = torch.arange(self.size, device=x.device)
        return x[row, starts.clamp(min=0)[:, :, None] + inside].mean(2)
