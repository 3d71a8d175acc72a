"""Where the blocks of packed documents lie: the one place that counts them, for compression and for selection.

Blocks count from each document's first token. All of a row's are in one list, in order, of a length that depends on
the row's length alone; a list that is longer than there are blocks ends in -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_starts", "capacity", "overlap"]


def block_starts(begin: Tensor, size: int, stride: int) -> Tensor:
    """(B, N) int64: positions of the first tokens of blocks of `size` tokens, `stride` apart, ascending, -1 for none.

    Only blocks that end within their document (equation 7): what a query selects beyond its own block is whole as well.
    begin (B, T) int64: position of the first token of each token's document.
    """
    rows, length = begin.shape
    where = torch.arange(length, device=begin.device).expand(rows, length)
    ends = where + size - 1
    inside = (ends < length) & (begin.gather(1, ends.clamp(max=length - 1)) == begin)
    first = inside & ((where - begin) % stride == 0)  # (B, T)
    starts = where.masked_fill(~first, length).sort(1).values[:, : capacity(length, size, stride)]
    return starts.masked_fill(starts == length, -1)


def capacity(length: int, size: int, stride: int) -> int:
    """Most whole blocks of a row, however many documents it is cut into: those of a single one (as stride <= size)."""
    return max(0, (length - size) // stride + 1)


def overlap(compressed: Tensor, selectable: Tensor, size: int, stride: int, block: int) -> Tensor:
    """(B, N, M) int64: how many strides of compressed block i lie in selectable block j: the weights that equation 9
    sums importance by. Whole blocks that share tokens are of one document, so weights to others are 0.

    compressed (B, N) of `size` tokens and selectable (B, M) of `block`: first tokens of `block_starts`, -1 weighs 0.
    """
    i, j = compressed[:, :, None], selectable[:, None, :]
    shared = torch.minimum(i + size, j + block) - torch.maximum(i, j)
    return (shared.clamp(min=0) // stride).masked_fill((i < 0) | (j < 0), 0)
