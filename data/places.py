"""Where rows of the endless stream of epochs lie in the text, without a sum over all documents.

A row reads a few documents of one block or two (`data/order.py`), so a process computes the blocks of its own rows, and
keeps as many as the places hold at which an epoch is read at the same time.
"""

from __future__ import annotations

import threading
from typing import NamedTuple, Protocol

import numpy as np

from data.order import READERS, DocumentOrder

__all__ = ["Pieces", "Places", "StreamPlaces"]


class Pieces(NamedTuple):
    """Stretches of documents that rows read, one entry each (K,) int64, row after row."""

    row: np.ndarray  # of those that were asked for
    start: (
        np.ndarray
    )  # column of the document's start token: below 0 where the row begins inside of the document
    document: np.ndarray  # index


class Places(Protocol):
    """Documents by position in an epoch's stream."""

    @property
    def tokens_per_epoch(self) -> int:
        """Start tokens included."""
        ...

    def pieces(self, epoch: int, begins: np.ndarray, width: int) -> Pieces:
        """Those of `width` positions each from `begins` (B,) on; what lies beyond the epoch is left out."""
        ...


class StreamPlaces:
    """Documents by position in an epoch's stream `[EOT] doc [EOT] doc ...`, in its order.

    offsets (n_docs + 1,) int64: document i has tokens offsets[i] to offsets[i + 1].
    """

    def __init__(self, offsets: np.ndarray, seed: int):
        self._offsets = offsets
        self._lock = threading.Lock()  # a step is replayed while the loader prepares others
        self.order = DocumentOrder(len(offsets) - 1, seed)
        size = self.order.block_size
        bounds = np.minimum(np.arange(self.order.n_blocks + 1) * size, self.order.n_docs)
        self._sizes = np.diff(np.asarray(offsets)[bounds] + bounds)  # of each block, with start tokens
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        # A block for each place at which an epoch is read, some of which are about to change theirs; one more as a step
        # may straddle two epochs.
        self._room = min(self.order.n_blocks, READERS + READERS // 8) + 1
        self._held: dict[
            tuple[int, int], int
        ] = {}  # (epoch, block): where in the arrays; the latest used last
        largest = int(self._sizes.max(initial=1))
        places = np.uint32 if largest < 1 << 32 else np.int64
        self._starts = np.empty((self._room, size), dtype=places)  # of documents, from their block's
        self._within = np.empty((self._room, size), dtype=np.uint16 if size <= 1 << 16 else np.uint32)

    @property
    def tokens_per_epoch(self) -> int:
        """Start tokens included."""
        return int(self._sizes.sum())

    def pieces(self, epoch: int, begins: np.ndarray, width: int) -> Pieces:
        """Those of `width` positions each from `begins` (B,) on; what lies beyond the epoch is left out."""
        with self._lock:
            blocks, bases = self._epoch(epoch)
        ends = np.minimum(begins + width, bases[-1])
        first = np.searchsorted(bases, begins, side="right") - 1
        last = np.searchsorted(bases, ends, side="left") - 1
        # A part of a row for each block that it reads.
        row, nth = spread(last - first + 1)
        turn = first[row] + nth
        begin = np.maximum(begins[row] - bases[turn], 0)
        end = np.minimum(ends[row], bases[turn + 1]) - bases[turn]
        with self._lock:
            part, inside, start = self._documents(epoch, blocks[turn], begin, end)
        row, turn = row[part], turn[part]
        document = blocks[turn] * self.order.block_size + inside
        return Pieces(row, start + bases[turn] - begins[row], document)

    def _documents(
        self, epoch: int, blocks: np.ndarray, begin: np.ndarray, end: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of positions begin to end - 1 of a block each (P,): which part, which document of its block, and where in the
        block its start token stands, each (K,) int64, part after part."""
        distinct, which = np.unique(blocks, return_inverse=True)
        found = []
        for some in range(0, len(distinct), self._room):
            here = np.flatnonzero((which >= some) & (which < some + self._room))
            slots = np.array(
                [self._slot(epoch, int(block)) for block in distinct[some : some + self._room]],
                dtype=np.int64,
            )
            slot, sizes = slots[which[here] - some], self._documents_in(blocks[here])
            low = self._last_at(slot, sizes, begin[here])
            high = self._last_at(slot, sizes, end[here] - 1)
            part, nth = spread(high - low + 1)
            place = low[part] + nth
            inside = self._within[slot[part], place].astype(np.int64)
            found.append((here[part], inside, self._starts[slot[part], place].astype(np.int64)))
        if len(found) == 1:
            return found[0]
        part, inside, start = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        order = np.argsort(part, kind="stable")
        return part[order], inside[order], start[order]

    def _last_at(self, slot: np.ndarray, sizes: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Which document of its block holds each position (P,): bisection in all blocks at once."""
        low, high = np.zeros(len(slot), dtype=np.int64), sizes.copy()
        for _ in range(int(sizes.max(initial=1)).bit_length()):
            middle = (low + high) // 2
            behind = self._starts[slot, middle] <= position
            low, high = np.where(behind, middle, low), np.where(behind, high, middle)
        return low

    def _documents_in(self, blocks: np.ndarray) -> np.ndarray:
        size = self.order.block_size
        return np.minimum(size, self.order.n_docs - blocks * size)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks in order (n_blocks,), and the stream position at which each begins, and the end (n_blocks + 1,)."""
        if epoch not in self._epochs:
            blocks = self.order.blocks(epoch)
            while len(self._epochs) >= 2:  # a step may straddle two epochs
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = blocks, np.concatenate([[0], np.cumsum(self._sizes[blocks])])
        return self._epochs[epoch]

    def _slot(self, epoch: int, block: int) -> int:
        """Where in the arrays a block is, once it is there."""
        if (slot := self._held.pop((epoch, block), None)) is None:
            full = len(self._held) == self._room
            slot = self._held.pop(next(iter(self._held))) if full else len(self._held)
            documents = self.order.block(epoch, block)
            first = block * self.order.block_size
            within = documents - first
            lengths = np.diff(np.asarray(self._offsets[first : first + len(documents) + 1]))[within]
            self._within[slot, : len(documents)] = within
            self._starts[slot, 0] = 0
            self._starts[slot, 1 : len(documents)] = np.cumsum(lengths[:-1] + 1)
        self._held[epoch, block] = slot
        return slot


def spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts (n,): 0 as often as the first says, 1 as often as the second, ...; and 0, 1, ... within each."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
