"""Noise as a function of where it is used, never of what was drawn before.

A number is keyed by (phase, seed, step, stream name) and counted by (global row, index in the row), so that it does
not depend on how a batch is split, on the number of processes, or on a resume. The generator is Philox4x32-10
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), over whole arrays of rows at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["Noise", "philox", "stratum"]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_12 = np.uint64(12)


def philox(counter: Sequence[np.ndarray], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Four words of 32 bits (held in uint64 arrays) per counter of four words; the key is two words."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _32) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _32) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _key(*parts: object) -> tuple[int, int]:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


class Noise:
    """Uniform numbers for a set of rows. `uniform` with the same stream name gives the same numbers again."""

    def __init__(self, seed: int, step: int, phase: str, rows: np.ndarray) -> None:
        self.seed, self.step, self.phase = seed, step, phase
        self.rows = np.asarray(rows, dtype=np.int64)  # (B,) global ids

    def child(self, name: str) -> Noise:
        """The same rows with streams of their own."""
        return Noise(self.seed, self.step, f"{self.phase}/{name}", self.rows)

    def uniform(self, stream: str, count: int) -> Tensor:
        """(B, count) fp64 in the open interval (0, 1)."""
        rows = self.rows.astype(np.uint64)[:, None]  # (B, 1); padding rows are -1 and wrap around
        pair = np.arange((count + 1) // 2, dtype=np.uint64)[None, :]  # a counter yields two numbers
        zero = np.zeros((1, 1), dtype=np.uint64)
        key = _key(self.phase, self.seed, self.step, stream)
        w0, w1, w2, w3 = philox((pair, rows & _LOW, rows >> _32, zero), key)
        first, second = (w0 << _32 | w1) >> _12, (w2 << _32 | w3) >> _12  # 52 bits each: 1 is out of reach
        words = np.stack([first, second], axis=-1).reshape(len(self.rows), -1)[:, :count]
        return torch.from_numpy((words.astype(np.float64) + 0.5) * 2.0**-52)

    def seeds(self, stream: str) -> Tensor:
        """(B,) int64, one for each row: of what a network draws itself (`models/layers/hashing.py`)."""
        return (self.uniform(stream, 1)[:, 0] * 2.0**52).to(torch.int64)

    def stratified(self, stream: str, rows_in_step: int, per_row: int = 1) -> Tensor:
        """(B, per_row) fp64 in (0, 1): over the whole step, one number in each of rows_in_step * per_row strata.

        The strata are dealt out by a permutation that depends on the key alone, so they are the same however the
        step is cut into micro-batches and processes.
        """
        total = rows_in_step * per_row
        slot = (self.rows % rows_in_step)[:, None] * per_row + np.arange(per_row)  # (B, per_row)
        dealt = _permutation(total, self.phase, self.seed, self.step, stream)[slot]
        return (torch.from_numpy(dealt) + self.uniform(stream, per_row)) / total


@lru_cache(maxsize=8)
def _permutation(total: int, *key: object) -> np.ndarray:
    low, high = _key("permutation", *key)
    generator = np.random.Generator(np.random.Philox(key=low | high << 32))
    return generator.permutation(total).astype(np.float64)


def stratum(u: Tensor, index: int, strata: int) -> Tensor:
    """A uniform number of the whole interval, moved into one of its equal parts."""
    return (index + u) / strata
