"""Who may attend to whom in block diffusion (Arriola et al. 2025, section 3.2 and figure 3).

A row's L clean tokens are followed by its L noisy ones: 2L keys, and as many queries, or only the noisy ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention.masks import additive, same

__all__ = [
    "OnePass",
    "Range",
    "Sparse",
    "cached_mask",
    "one_pass_groups",
    "one_pass_mask",
    "one_pass_pairs",
    "ranges_of",
]

Range = tuple[int, int]

QUERY_GROUP = 128  # queries that share their keys in `one_pass_groups`


@dataclass(frozen=True, eq=False)
class OnePass:
    """`one_pass_mask` of blocks (L,), none longer than `longest`, as a pattern of `Visible`. `noisy_only`: there are no
    queries of clean tokens."""

    blocks: Tensor
    longest: int
    noisy_only: bool = False

    @property
    def length(self) -> int:
        return self.blocks.shape[0]

    def mask(self, doc_ids: Tensor | None) -> Tensor:
        """(B or 1, 1, T, 2L) bool, within documents (B, L) where they are given."""
        mask = one_pass_mask(self.blocks, self.noisy_only)[None, None]
        if doc_ids is None:
            return mask
        both = doc_ids.repeat(1, 2)  # (B, 2L)
        return mask & same(doc_ids if self.noisy_only else both, both)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether query number `query` may look at key number `key`: `mask` without documents, one pair at a time."""
        length = self.length
        noisy_query = query >= (0 if self.noisy_only else length)
        noisy_key = key >= length
        mine, its = self.blocks[query % length], self.blocks[key % length]
        # Not `==` of truth values: torch's compiler fails on bounds of it.
        return (~(noisy_query ^ noisy_key) & (mine == its)) | (~noisy_key & (mine > its))


class Sparse(NamedTuple):
    """A mask by groups of queries, each with the ranges of keys that any of its queries may look at.

    queries: (start, end) of each group; those in no group get no result. keys: of each group, the (start, end) of its
    ranges. biases: of each group, as from `additive`, (B or 1, 1, T', S') over the queries and keys of the group.
    """

    queries: Sequence[Range]
    keys: Sequence[Sequence[Range]]
    biases: Sequence[Tensor]

    @classmethod
    def of(
        cls, mask: Tensor, queries: Sequence[Range], keys: Sequence[Sequence[Range]], dtype: torch.dtype
    ) -> Sparse:
        """mask (B or 1, 1, T, S) bool, which must be False outside of the groups' keys."""
        biases = []
        for (start, end), ranges in zip(queries, keys, strict=True):
            biases.append(additive(ranges_of(mask[:, :, start:end], ranges, 3), dtype))
        return cls(queries, keys, biases)


def ranges_of(x: Tensor, ranges: Sequence[Range], dim: int) -> Tensor:
    return torch.cat([x.narrow(dim, start, end - start) for start, end in ranges], dim)


def one_pass_mask(blocks: Tensor, noisy_only: bool = False) -> Tensor:
    """(2L, 2L) bool for clean tokens followed by noisy ones; rows are queries, True is allowed. noisy_only: the last L
    rows.

    blocks (L,): block of each position, not decreasing. Allowed: the own block in the own half; from noisy to
    clean tokens of earlier blocks; from clean to clean tokens of earlier blocks. So noisy blocks never see
    each other, and clean tokens never see noise: L^2 + L L' pairs for equal blocks of L'.
    """
    own = blocks[:, None] == blocks[None, :]  # (L, L)
    earlier = blocks[:, None] > blocks[None, :]
    noisy = torch.cat((earlier, own), dim=1)
    if noisy_only:
        return noisy
    clean = torch.cat((own | earlier, torch.zeros_like(own)), dim=1)
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
