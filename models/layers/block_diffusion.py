"""Who may attend to whom in block diffusion (Arriola et al. 2025, section 3.2 and figure 3)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from models.layers.bidirectional import Range, Sparse

__all__ = ["cached_mask", "one_pass_groups", "one_pass_mask"]

QUERY_GROUP = 128  # queries that share their keys in `one_pass_groups`


def one_pass_mask(blocks: Tensor) -> Tensor:
    """(2L, 2L) bool for noisy tokens followed by the clean ones; rows are queries, True is allowed.

    blocks (L,): block of each position, not decreasing. Allowed: the own block in the own half; from noisy to
    clean tokens of earlier blocks; from clean to clean tokens of earlier blocks. So noisy blocks never see
    each other, and clean tokens never see noise: L^2 + L L' pairs for equal blocks of L'.
    """
    same = blocks[:, None] == blocks[None, :]  # (L, L)
    later = blocks[:, None] > blocks[None, :]
    noisy = torch.cat((same, later), dim=1)
    clean = torch.cat((torch.zeros_like(same), same | later), dim=1)
    return torch.cat((noisy, clean), dim=0)


def one_pass_groups(mask: Tensor, block_length: int, dtype: torch.dtype, noisy_only: bool = False) -> Sparse:
    """`one_pass_mask`, (..., 2L, 2L), by groups of queries: about half of the pairs are never looked at.

    block_length: of the longest block. noisy_only: without the queries of the clean tokens.
    """
    length = mask.shape[-1] // 2
    count = max(1, length // QUERY_GROUP)
    groups = list(pairwise(length * i // count for i in range(count + 1)))
    # A block that a group shares with its neighbours reaches so far into them at most.
    own = [(max(0, start - block_length + 1), min(length, end + block_length - 1)) for start, end in groups]
    queries = groups
    keys: list[list[Range]] = [
        [near, (length, length + end)] for near, (_, end) in zip(own, groups, strict=True)
    ]
    if not noisy_only:
        queries = queries + [(length + start, length + end) for start, end in groups]
        keys = keys + [[(length, length + last)] for _, last in own]
    return Sparse.of(mask, queries, keys, dtype)


def cached_mask(blocks: Tensor, cached: int) -> Tensor:
    """(T, cached + T) bool: new tokens see all that is cached, their own block, and new blocks before it."""
    fresh = blocks[:, None] >= blocks[None, :]  # (T, T)
    return torch.cat((fresh.new_ones(fresh.shape[0], cached), fresh), dim=1)
