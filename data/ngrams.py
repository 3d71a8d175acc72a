"""Interpolated Witten-Bell n-gram models over bytes, vectorised.

P(w | h) = (c(hw) + t(h) P(w | h')) / (c(h) + t(h)), where h' is h without its first byte, c counts in the
training text, t(h) is the number of different bytes seen after h, and below the empty context stands the
uniform law over 256 bytes (Witten and Bell 1991; Chen and Goodman 1999, section 2.4). A context never seen
leaves P(w | h').

Contexts stop at a document's start: its first bytes are predicted from as many bytes as there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

LONGEST = 8  # bytes packed into one 64-bit key
CHUNK = 1 << 20  # places that are packed together
PARTS = 8  # of a text by the first byte of n-grams, of which one is counted and used at a time


class Texts:
    """Documents as one byte array (n,), with the number of bytes before each in its document (up to 255)."""

    def __init__(self, documents: Sequence[bytes]):
        self.bytes = np.frombuffer(b"".join(documents), dtype=np.uint8)
        self.before = np.full(len(self.bytes), 255, dtype=np.uint8)
        start = 0
        for document in documents:
            reach = min(len(document), 255)
            self.before[start : start + reach] = np.arange(reach)
            start += len(document)

    def grams(self, n: int, low: int = 0, high: int = 256) -> np.ndarray:
        """Packed n-grams inside documents (m,) uint64, by place; those whose first byte is `low` to `high` - 1."""
        count = max(len(self.bytes) - n + 1, 0)
        parts = [np.zeros(0, dtype=np.uint64)]
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            inside = self.before[start + n - 1 : stop + n - 1] >= n - 1
            if (low, high) != (0, 256):
                first = self.bytes[start:stop]
                inside &= (first >= low) & (first < high)
            begins = np.flatnonzero(inside) + start
            keys = np.zeros(len(begins), dtype=np.uint64)
            for place in range(n):
                keys <<= np.uint64(8)
                keys |= self.bytes[begins + place]
            parts.append(keys)
        return np.concatenate(parts)

    def ends(self, n: int, low: int = 0, high: int = 256) -> np.ndarray:
        """Index (m,) of the last byte of each of `grams(n, low, high)`."""
        first = self.bytes[: max(len(self.bytes) - n + 1, 0)]
        inside = (self.before[n - 1 :] >= n - 1) & (first >= low) & (first < high)
        return np.flatnonzero(inside) + n - 1


def witten_bell(train: Texts, heldout: Texts, orders: Sequence[int]) -> dict[int, np.ndarray]:
    """Probability of every held-out byte (n,) under the model of each order (an n-gram's n) asked for."""
    probability = np.full(len(heldout.bytes), 1 / 256)
    raised = by_order(train, lambda: [heldout], probability, max(orders))
    return {n: probability.copy() for n in raised if n in orders}


def by_order(
    train: Texts, blocks: Callable[[], Iterable[Texts]], probability: np.ndarray, longest: int
) -> Iterator[int]:
    """Each order, once `probability` (n,) is that of the held-out bytes under its model; 1 / 256 of each to begin with.

    `blocks` gives held-out text block by block, the same each time: in memory are only counts of the training text, and
    of these one part at a time, as a context begins as its n-grams do.
    """
    assert longest <= LONGEST
    parts = _parts(train.bytes)
    for n in range(1, longest + 1):
        for some in (
            [parts] if n == 1 else [[part] for part in parts]
        ):  # the empty context begins with nothing
            table = _Table(train, n, some)
            start = 0
            for block in blocks():
                stop = start + len(block.bytes)
                table.interpolate(block, probability[start:stop])
                start = stop
        yield n


class _Table:
    """Counts of the n-grams of a text, by context, of parts that lie behind one another."""

    def __init__(self, train: Texts, n: int, parts: Sequence[tuple[int, int]]):
        self.n, self.low, self.high = n, parts[0][0], parts[-1][1]
        grams, counts = [], []
        for low, high in parts:
            keys = train.grams(n, low, high)
            keys.sort()
            distinct, first = _runs(keys)
            grams.append(distinct)
            counts.append(np.diff(first).astype(np.uint32))
        self.grams, self.counts = np.concatenate(grams), np.concatenate(counts)
        del grams, counts
        self.contexts, first_gram = _runs(self.grams >> np.uint64(8))
        self.types = np.diff(first_gram).astype(np.uint32)
        sums = np.add.reduceat(self.counts, first_gram[:-1]) if len(self.grams) else self.counts
        self.totals = sums.astype(np.uint32)

    def interpolate(self, heldout: Texts, probability: np.ndarray) -> None:
        """Raise `probability` from order n - 1 to order n, in place."""
        if not len(self.grams):
            return
        part = (self.n, self.low, self.high)
        wanted, last = heldout.grams(*part), heldout.ends(*part)
        context, known = _find(self.contexts, wanted >> np.uint64(8))
        wanted, last, context = wanted[known], last[known], context[known]
        gram, seen = _find(self.grams, wanted)
        count, types = np.where(seen, self.counts[gram], 0), self.types[context]
        probability[last] = (count + types * probability[last]) / (self.totals[context] + types)


def _parts(text: np.ndarray) -> list[tuple[int, int]]:
    """About PARTS ranges of byte values, each (low, high), with equal shares of the text."""
    share = np.cumsum(np.bincount(text, minlength=256)) * PARTS // max(len(text), 1)
    bounds = [0, *(int(value) + 1 for value in np.flatnonzero(np.diff(share)) if value < 255), 256]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values (m,) of a sorted array, and where each begins, with the length behind (m + 1,)."""
    if not len(ordered):
        return ordered, np.zeros(1, dtype=np.int64)
    first = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
    return ordered[first[:-1]], first


def _find(ordered: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place of each wanted value (clipped into range) and whether it is there."""
    place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return place, ordered[place] == wanted
