"""Interpolated Witten-Bell n-gram models over bytes, vectorised.

P(w | h) = (c(hw) + t(h) P(w | h')) / (c(h) + t(h)), where h' is h without its first byte, c counts in the
training text, t(h) is the number of different bytes seen after h, and below the empty context stands the
uniform law over 256 bytes (Witten and Bell 1991; Chen and Goodman 1999, section 2.4). A context never seen
leaves P(w | h').

Contexts stop at a document's start: its first bytes are predicted from as many bytes as there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONGEST = 8  # bytes packed into one 64-bit key


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

    def grams(self, n: int) -> np.ndarray:
        """Packed n-grams inside documents (m,) uint64, by place."""
        count = max(len(self.bytes) - n + 1, 0)
        keys = np.zeros(count, dtype=np.uint64)
        for place in range(n):
            keys <<= np.uint64(8)
            keys |= self.bytes[place : place + count]
        return keys[self.before[n - 1 :] >= n - 1]

    def ends(self, n: int) -> np.ndarray:
        """Index (m,) of the last byte of each of `grams(n)`."""
        return np.flatnonzero(self.before >= n - 1)


def witten_bell(train: Texts, heldout: Texts, orders: Sequence[int]) -> dict[int, np.ndarray]:
    """Probability of every held-out byte (n,) under the model of each order (an n-gram's n) asked for."""
    assert max(orders) <= LONGEST
    probability = np.full(len(heldout.bytes), 1 / 256)
    result = {}
    for n in range(1, max(orders) + 1):
        _interpolate(train, heldout, n, probability)
        if n in orders:
            result[n] = probability.copy()
    return result


def _interpolate(train: Texts, heldout: Texts, n: int, probability: np.ndarray) -> None:
    """Raise `probability` from order n - 1 to order n, in place."""
    keys = train.grams(n)
    if not len(keys):
        return
    keys.sort()
    grams, first = _runs(keys)
    counts = np.diff(first)
    contexts, first_gram = _runs(grams >> np.uint64(8))
    types = np.diff(first_gram)
    totals = np.add.reduceat(counts, first_gram[:-1])

    wanted, last = heldout.grams(n), heldout.ends(n)
    context, known = _find(contexts, wanted >> np.uint64(8))
    wanted, last, context = wanted[known], last[known], context[known]
    gram, seen = _find(grams, wanted)
    count = np.where(seen, counts[gram], 0)
    probability[last] = (count + types[context] * probability[last]) / (totals[context] + types[context])


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values (m,) of a sorted array, and where each begins, with the length behind (m + 1,)."""
    first = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
    return ordered[first[:-1]], first


def _find(ordered: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place of each wanted value (clipped into range) and whether it is there."""
    place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return place, ordered[place] == wanted
