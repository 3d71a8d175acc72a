"""The order of a mixture's documents: a function of (seed, weights, where stages end), not a state.

Of the sources that are not ahead of their share of the bytes read so far in this stage, the next document is of the one
that will soonest have had its share with it; of the first of them where several will. (The worst-case fair queueing of
Bennett and Zhang 1996, https://doi.org/10.1109/INFCOM.1996.497885, with documents for packets.) So what was read of a
source is at any point within one document of its share. Each source goes through its own documents in the order that it
has alone (`data/order.py`), epoch after epoch: the order knows no tokenizer.

The endless stream is cut into rounds, at ends of documents: of so many bytes as all the training text has, `LARGEST`
at most, and at the end of a stage. A round can be computed from where the one before it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

import numpy as np

from data.mix_texts import Mixture
from data.order import DocumentOrder

__all__ = ["LARGEST", "MixedOrder"]

LARGEST = 64 << 20  # bytes of a round
ROUNDING = 1 / 64  # bytes: who is ahead by less may not be, up to 10^14 of them
_TOGETHER = 4096  # documents that are looked up at once


@dataclass(frozen=True)
class _Start:
    """Where a round begins: bytes read before it in all, stage, bytes read in it by source, documents taken ever."""

    total: int
    stage: int
    given: tuple[int, ...]
    taken: tuple[int, ...]


class MixedOrder:
    """The documents of each round. doc_bytes (n,) int64: of all documents, one source behind the other."""

    def __init__(self, doc_bytes: np.ndarray, mixture: Mixture, seed: int):
        self.doc_bytes, self.shares = doc_bytes, mixture.shares
        self._firsts = np.cumsum([0, *mixture.train])
        self._orders = [DocumentOrder(count, seed) for count in mixture.train]
        self.round_bytes = min(int(doc_bytes.sum()), LARGEST)
        self.set_ends([float("inf")] * (len(self.shares) - 1))

    def set_ends(self, ends: Sequence[float]) -> None:
        """Bytes after which each stage but the last ends; that one goes on for ever."""
        assert len(ends) == len(self.shares) - 1, ends
        none = (0,) * len(self._orders)
        self.ends = tuple(ends)
        self._starts = {0: _Start(0, 0, none, none)}

    def start(self, number: int) -> dict[str, Any]:
        """Where a round begins, as JSON: `begin_at` makes later ones from there, without those before it."""
        while number not in self._starts:
            self._make(max(known for known in self._starts if known < number))
        return asdict(self._starts[number])

    def begin_at(self, number: int, start: Mapping[str, Any]) -> None:
        """Take from a run where a round begins."""
        of_sources = {name: tuple(start[name]) for name in ("given", "taken")}
        self._starts[number] = _Start(start["total"], start["stage"], **of_sources)

    def documents(self, number: int) -> np.ndarray:
        """Those of a round (k,) int64, in order."""
        self.start(number)
        return self._make(number)

    def is_cut_short(self, number: int) -> bool:
        """Whether a round is ended by its stage."""
        return self.start(number + 1)["total"] - self.start(number)["total"] < self.round_bytes

    def _make(self, number: int) -> np.ndarray:
        """A round whose start is known; that of the next one is known then."""
        start = self._starts[number]
        stage, given = start.stage, list(start.given)
        while stage < len(self.ends) and start.total >= self.ends[stage]:
            stage, given = stage + 1, [0] * len(given)
        stop: float = start.total + self.round_bytes
        if stage < len(self.ends):
            stop = min(stop, self.ends[stage])
        shares, taken = self.shares[stage], list(start.taken)
        sources = [place for place, share in enumerate(shares) if share > 0]
        feeds = [self._feed(place, count) for place, count in enumerate(taken)]
        ahead = {place: next(feeds[place]) for place in sources}  # the next document of each, and its bytes
        found, total, in_stage = [], start.total, sum(given)
        while total < stop:
            best, soonest = -1, float("inf")
            for place in sources:
                if given[place] - shares[place] * in_stage < ROUNDING:
                    due = (given[place] + ahead[place][1]) / shares[place]
                    if due < soonest:
                        best, soonest = place, due
            document, size = ahead[best]
            ahead[best] = next(feeds[best])
            found.append(document)
            taken[best] += 1
            given[best] += size
            in_stage += size
            total += size
        self._starts[number + 1] = _Start(total, stage, tuple(given), tuple(taken))
        return np.array(found, dtype=np.int64)

    def _feed(self, place: int, taken: int) -> Iterator[tuple[int, int]]:
        """Documents and bytes of a source, from the so manieth on."""
        order = self._orders[place]
        if order.n_docs == 1:  # an epoch for every document would cost more than all else
            first = int(self._firsts[place])
            yield from repeat((first, int(self.doc_bytes[first])))
        epoch, within = divmod(taken, order.n_docs)
        while True:
            for number in order.blocks(epoch).tolist():
                size = min(order.block_size, order.n_docs - number * order.block_size)
                if within < size:
                    block = order.block(epoch, number)[within:] + self._firsts[place]
                    for start in range(0, len(block), _TOGETHER):
                        some = block[start : start + _TOGETHER]
                        yield from zip(some.tolist(), self.doc_bytes[some].tolist(), strict=True)
                within = max(within - size, 0)
            epoch += 1
