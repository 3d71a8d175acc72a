"""Lists of blocks turned round: who selected which tokens. In torch, without waiting for the device: every size follows
from shapes.

Pairs of a query and a block that it selected are sorted by where the block begins. Tokens are dealt with in tiles of a
block, and the pairs of a tile in segments, because the first block of a document is selected by all of its queries.
Tiles are the blocks that were selected, if there are at most twice as many as fit side by side: of documents that begin
anywhere each pair is then in one tile. Else (blocks that begin at every other token) tiles lie side by side, and a pair
is in the two that its block touches.

Shapes: B rows, T queries, S keys, G groups, N blocks of L tokens each, P = T N pairs, M segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LONGEST", "Inverted", "inverted"]

LONGEST = 256  # pairs of a segment


@dataclass(frozen=True)
class Inverted:
    """`pairs` (B G, P) int64: numbers of pairs in a flattened (B, G, T, N), by where their blocks begin, `starts`
    (B G, P) int32: S where there is none. Segments, (B G, M) int64, by `begins`, the first of the L tokens whose pairs
    they hold: `firsts` and `lengths`, 0 for a segment that does not exist, behind all that do."""

    pairs: Tensor
    starts: Tensor
    begins: Tensor
    firsts: Tensor
    lengths: Tensor


def inverted(starts: Tensor, keys: int, block: int, longest: int = LONGEST) -> Inverted:
    """starts (B, T, G, N) int32 as `reference` has them -> segments of at most `longest` pairs."""
    batch, queries, groups, count = starts.shape
    lists, each = batch * groups, queries * count
    device = starts.device
    found, pairs = _sorted(starts.transpose(1, 2).reshape(lists, each), keys)
    tokens = torch.arange(keys + 1, device=device, dtype=torch.int32).expand(lists, -1).contiguous()
    before = torch.searchsorted(found, tokens)  # (B G, S + 1): pairs of blocks that begin before a token
    most = 2 * -(-keys // block)
    tiles, low, high = _tiles(before, block, most)
    first, end = before.gather(1, low), before.gather(1, high)  # (B G, most)
    parts = (end - first + longest - 1) // longest
    ends = parts.cumsum(1)
    slots = torch.arange(2 * each // longest + most, device=device).expand(lists, -1).contiguous()
    tile = torch.searchsorted(ends, slots, right=True)
    real = tile < most
    tile = tile.clamp(max=most - 1)
    firsts = first.gather(1, tile) + longest * (slots - (ends - parts).gather(1, tile))
    lengths = torch.where(real, (end.gather(1, tile) - firsts).clamp(max=longest), 0)
    return Inverted(pairs, found, torch.where(real, tiles.gather(1, tile), keys), firsts, lengths)


def _sorted(starts: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """starts (B G, P) -> sorted, those without a block as S; and the numbers of their pairs. As one list: a GPU sorts
    many long ones slowly."""
    lists, each = starts.shape
    wide = torch.int32 if lists * (keys + 1) < 2**31 else torch.int64
    own = torch.arange(lists, device=starts.device, dtype=wide)[:, None] * (keys + 1)
    told_apart = own + torch.where(starts < 0, keys, starts)
    found, pairs = told_apart.flatten().sort(stable=True)
    return (found.view(lists, each) - own).to(torch.int32), pairs.view(lists, each)


def _tiles(before: Tensor, block: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """before (B G, S + 1) -> where tiles begin, (B G, most), S behind the last; and the blocks that touch each begin
    from `low` to `high` - 1."""
    keys = before.shape[1] - 1
    rank = (before[:, 1:] > before[:, :-1]).cumsum(1)  # (B G, S): of tokens where a block begins
    number = torch.arange(most, device=before.device).expand(len(before), -1).contiguous()
    own = torch.searchsorted(rank, number + 1)  # S where there are no more
    few = rank[:, -1:] <= most
    tiles = torch.where(few, own, (number * block).clamp(max=keys))
    low = torch.where(few, tiles, (tiles - block + 1).clamp(min=0))
    low = torch.where(tiles < keys, low, keys)
    high = torch.where(few, tiles + 1, tiles + block).clamp(max=keys)
    return tiles, low, high
