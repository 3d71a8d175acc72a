"""Who may attend to whom in block diffusion (Arriola et al. 2025, section 3.2 and figure 3)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from models.layers.bidirectional import Range, Sparse

__all__ = ["cached_mask", "one_pass_groups", "one_pass_mask", "one_pass_pairs"]

QUERY_GROUP = 128  # queries that share their keys in `one_pass_groups`


def one_pass_mask(blocks: Tensor) -> Tensor:
    """(2L, 2L) bool for clean tokens followed by noisy ones; rows are queries, True is allowed.

    blocks (L,): block of each position, not decreasing. Allowed: the own block in the own half; from noisy to
    clean tokens of earlier blocks; from clean to clean tokens of earlier blocks. So noisy blocks never see
    each other, and clean tokens never see noise: L^2 + L L' pairs for equal blocks of L'.
    """
    same = blocks[:, None] == blocks[None, :]  # (L, L)
    earlier = blocks[:, None] > blocks[None, :]
    clean = torch.cat((same | earlier, torch.zeros_like(same)), dim=1)
    noisy = torch.cat((earlier, same), dim=1)
    return torch.cat((clean, noisy), dim=0)


def one_pass_groups(mask: Tensor, longest: int, dtype: torch.dtype, noisy_only: bool = False) -> Sparse:
    """`one_pass_mask`, (..., 2L, 2L), by groups of queries: about half of the pairs are never looked at.

    longest: length of the longest block. noisy_only: without the queries of the clean tokens, whose rows the mask may
    then leave out, (..., L, 2L).
    """
    length = mask.shape[-1] // 2
    noisy = mask.shape[-2] - length  # the first noisy query
    return Sparse.of(mask, *_groups(length, noisy, longest, noisy_only), dtype)


def one_pass_pairs(length: int, longest: int, noisy_only: bool = False) -> int:
    """Pairs of query and key that the groups of `one_pass_groups` multiply, masked ones included."""
    queries, keys = _groups(length, length, longest, noisy_only)
    return sum(
        (end - start) * sum(last - first for first, last in ranges)
        for (start, end), ranges in zip(queries, keys, strict=True)
    )


def _groups(length: int, noisy: int, longest: int, noisy_only: bool) -> tuple[list[Range], list[list[Range]]]:
    """Queries of each group and the ranges of their keys; `noisy`: number of the first noisy query."""
    count = max(1, length // QUERY_GROUP)
    groups = list(pairwise(length * i // count for i in range(count + 1)))
    # A block that a group shares with its neighbours reaches so far into them at most.
    own = [(max(0, start - longest + 1), min(length, end + longest - 1)) for start, end in groups]
    queries: list[Range] = []
    keys: list[list[Range]] = []
    if not noisy_only:
        queries += groups
        keys += [[(0, last)] for _, last in own]
    for (start, end), (first, last) in zip(groups, own, strict=True):
        queries.append((noisy + start, noisy + end))
        keys.append([(0, end), (length + first, length + last)])
    return queries, keys


def cached_mask(blocks: Tensor, cached: int) -> Tensor:
    """(T, cached + T) bool: new tokens see all that is cached, their own block, and new blocks before it."""
    fresh = blocks[:, None] >= blocks[None, :]  # (T, T)
    return torch.cat((fresh.new_ones(fresh.shape[0], cached), fresh), dim=1)
