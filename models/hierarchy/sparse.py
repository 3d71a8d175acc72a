"""Native sparse attention to the places of a stage (Yuan et al. 2025, arXiv:2502.11089): its positions, blocks and
windows count chunks. Blocks never cross documents, and rows of a cache are as far as their own chunks.

Shapes: R rows, M places, D width, B rows of the batch, W places of the longest, G groups of heads, h their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention import attention_call, training_facts
from models.hierarchy.cache import RowsOf
from models.hierarchy.places import Places
from models.sparse.blocks import capacity
from models.sparse.config import NSAConfig
from models.sparse.mixer import Layout, SparseAttention

__all__ = ["ChunkAttention", "Chunks"]


@dataclass(frozen=True)
class Chunks:
    """What a layer is told. Of text as a whole `places`; behind a cache `at`, rows that hold `past` places each."""

    layout: Layout
    places: Places | None = None
    at: RowsOf | None = None
    past: int = 0


class ChunkAttention(SparseAttention):
    def __init__(self, cfg: NSAConfig, name: str) -> None:
        super().__init__(cfg, 0)
        self.name = name

    def forward(self, x: Tensor, chunks: Chunks) -> Tensor:  # type: ignore[override]  # of places, not of rows
        """(R, M, D) of x (R, M, D), already normalised."""
        q, keys, values = self._projected(x)
        if chunks.places is not None:
            # Each row of the batch attends by itself.
            q, *both = (chunks.places.rows(t) for t in (q, *keys, *values))  # (B, W, ...)
            keys, values = both[: len(keys)], both[len(keys) :]
        cache: Any = None if chunks.at is None else _RowsCache(self, chunks.at, chunks.past)
        branches = self._branches(q, keys, values, chunks.layout, cache)
        if chunks.places is not None:
            branches = tuple(chunks.places.back(branch) for branch in branches)
        return self._joined(x, branches)

    def empty(self, rows: int) -> dict[str, Tensor]:
        """Of a cache: keys and values of the last places that the window and the next summary see."""
        c, like = self.cfg, self.q_proj.weight
        shape = (2, c.n_kv_heads, max(c.head_dim, c.value_dim))
        return {
            f"{self.name}.{part}": like.new_zeros(rows, *shape[:2], seen - 1, shape[2])
            for part, seen in self.seen.items()
        }

    @property
    def seen(self) -> dict[str, int]:
        """Of the parts of a cache that forget: places that the last one sees, itself included."""
        return {"window": self.cfg.sliding_window, "unsummed": self.cfg.compress_block_size}

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        c = self.cfg
        facts = training_facts(seq_len, window=c.sliding_window, offsets=False)
        call = attention_call(facts, (c.n_heads, c.n_kv_heads), max(c.head_dim, c.value_dim))
        return super().kernel_calls(seq_len) | {"attention": call}


class _RowsCache:
    """What `SparseCache` is of a text, of some rows of a hierarchy's, which hold `past` places each."""

    def __init__(self, mixer: ChunkAttention, at: RowsOf, past: int) -> None:
        self.mixer, self.at, self.past = mixer, at, past

    def __getitem__(self, part: str) -> Any:
        name, c = f"{self.mixer.name}.{part}", self.mixer.cfg
        if part in self.mixer.seen:
            return _Recent(self.at, name, self.past)
        held = capacity(self.past, c.compress_block_size, c.stride) if part == "summaries" else self.past
        return _Stored(self.at, name, held)


@dataclass(frozen=True)
class _Recent:
    at: RowsOf
    name: str
    past: int

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(R, G, C, h) -> with what the first of them sees before it, as `WindowedKVCache.append`."""
        kept = self.at.read(self.name).to(keys.dtype)  # (R, 2, G, most, h)
        most = kept.shape[3]
        both = torch.cat((kept, torch.stack((keys, values), 1)), 3)
        self.at.write(self.name, both[:, :, :, both.shape[3] - most :])
        seen = both[:, :, :, most - min(self.past, most) :]
        return seen[:, 0], seen[:, 1]


@dataclass(frozen=True)
class _Stored:
    at: RowsOf
    name: str
    held: int

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(R, G, C, h) -> with all before them, as `KVCache.append`. C may be 0, of summaries."""
        slots = self.held + torch.arange(keys.shape[2]).expand(len(keys), -1)
        return self.at.cache.store(self.name, self.at, slots, keys, values, self.held + keys.shape[2])
