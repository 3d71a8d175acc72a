"""Learning the merges of a byte-level BPE, in time that does not depend on how long words are.

All distinct words stand behind one another in one array of symbols, linked to their neighbours. A merge looks at the
places of the rarer of its two tokens and touches those where the pair stands, so that a million letters without a blank
(DNA, Chinese, base64) cost what a million letters of prose do. A heap with lazy deletion finds the next pair.
"""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np

MIN_COUNT = 2  # a pair seen once is a quotation, not a regularity
GONE = -1  # a place whose symbol is part of the one before it; the neighbour of a word's end
AT_A_TIME = 1 << 20  # places

Pair = tuple[int, int]


def learn_merges(words: Counter[str], size: int) -> list[bytes]:
    """Up to `size` token byte strings; a token's place is its id and its merge priority.

    The first 256 are the single bytes. Fewer than `size` come back where no pair occurs twice any more.
    """
    vocabulary = [bytes([value]) for value in range(256)]
    if not any(words):
        return vocabulary
    table = _PairTable(words, vocabulary)
    while len(vocabulary) < size and (pair := table.most_frequent()) is not None:
        # Always new bytes: merges apply everywhere, so a stretch between token ends is split one way only.
        vocabulary.append(vocabulary[pair[0]] + vocabulary[pair[1]])
        table.merge(pair, len(vocabulary) - 1)
    return vocabulary


class _PairTable:
    """Counts of adjacent pairs over the distinct words, kept up to date under merges.

    Arrays by place (n,): `symbol`, the place before and behind (`before`, `behind`; GONE at a word's ends), and the
    word's count. `places` of a token (m,), ascending, may hold some where it stands no longer.
    """

    def __init__(self, words: Counter[str], vocabulary: list[bytes]):
        self.vocabulary = vocabulary
        encoded = [word.encode("utf-8") for word in words]
        lengths = np.array([len(word) for word in encoded])
        self.symbol = np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.int32)
        self.weight = np.repeat(np.array(list(words.values()), dtype=np.int64), lengths)
        self.behind = np.arange(1, len(self.symbol) + 1, dtype=np.int32)
        self.before = self.behind - 2
        ends = np.cumsum(lengths[lengths > 0])
        self.behind[ends - 1] = GONE
        self.before[(ends - lengths[lengths > 0])] = GONE
        order = np.argsort(self.symbol, kind="stable").astype(np.int32)
        bounds = np.searchsorted(self.symbol[order], np.arange(257))
        self.places = {byte: order[bounds[byte] : bounds[byte + 1]] for byte in range(256)}
        self.counts: dict[Pair, int] = {}
        for pair, count in self._pairs_of_bytes().items():
            self.counts[divmod(pair, 256)] = count
        self.heap = [self._entry(pair) for pair in self.counts]
        heapq.heapify(self.heap)

    def _pairs_of_bytes(self) -> dict[int, int]:
        """Counts of 256 * first + second, some places at a time: what `_add_up` sorts takes many times their memory."""
        counts = np.zeros(1 << 16, dtype=np.int64)
        for start in range(0, len(self.symbol), AT_A_TIME):
            place = start + np.flatnonzero(self.behind[start : start + AT_A_TIME] != GONE)
            np.add.at(counts, self.symbol[place] * 256 + self.symbol[place + 1], self.weight[place])
        return {int(pair): int(counts[pair]) for pair in np.flatnonzero(counts)}

    def _entry(self, pair: Pair) -> tuple[int, bytes, bytes, Pair]:
        return -self.counts[pair], self.vocabulary[pair[0]], self.vocabulary[pair[1]], pair

    def most_frequent(self) -> Pair | None:
        """The pair with the highest count; the smaller bytes among equals; None below `MIN_COUNT`."""
        while self.heap:
            negative_count, _, _, pair = heapq.heappop(self.heap)
            if -negative_count == self.counts.get(pair, 0):  # else outdated: a newer entry is in the heap
                return pair if -negative_count >= MIN_COUNT else None
        return None

    def merge(self, pair: Pair, token: int) -> None:
        """Replace the pair by `token` in every word, left to right."""
        first, second = pair
        left = self._where(first, second)
        right = self.behind[left]
        before, behind, weight = self.before[left], self.behind[right], self.weight[left]
        self.symbol[left], self.symbol[right] = token, GONE
        # A neighbour may be part of this merge too: the pair between the two is counted by the left one of them.
        lost = (before != GONE) & (self.symbol[before] != GONE)
        was_behind = np.where(self.symbol[behind] == token, first, self.symbol[behind])
        changed: dict[Pair, int] = {}
        self._count(changed, self.symbol[before[lost]], first, -weight[lost], token_is_second=True)
        inside = behind != GONE
        self._count(changed, was_behind[inside], second, -weight[inside], token_is_second=False)

        self.behind[left] = behind
        self.before[behind[inside]] = left[inside]
        before = self.before[left]
        come = (before != GONE) & (self.symbol[before] != token)
        self._count(changed, self.symbol[before[come]], token, weight[come], token_is_second=True)
        self._count(changed, self.symbol[behind[inside]], token, weight[inside], token_is_second=False)

        self.places[token] = left
        self.counts.pop(pair)
        changed.pop(pair, None)
        for other, change in changed.items():
            self.counts[other] = self.counts.get(other, 0) + change
            if self.counts[other] >= MIN_COUNT:
                heapq.heappush(self.heap, self._entry(other))

    def _where(self, first: int, second: int) -> np.ndarray:
        """Places of `first` with `second` behind it (m,), ascending; of overlapping ones every second."""
        by_first = len(self.places[first]) <= len(self.places[second])
        token = first if by_first else second
        here = self.places[token]
        here = self.places[token] = here[
            self.symbol[here] == token
        ]  # forgets those where it stands no longer
        other = (self.behind if by_first else self.before)[here]
        fits = (other != GONE) & (self.symbol[other] == (second if by_first else first))
        left = (here if by_first else other)[fits]
        if first != second:
            return left
        # In a run of n equal symbols the 1st, 3rd, ... begin a pair.
        number = np.arange(len(left))
        begins = np.ones(len(left), dtype=bool)
        begins[1:] = self.behind[left[:-1]] != left[1:]
        return left[(number - np.maximum.accumulate(np.where(begins, number, 0))) % 2 == 0]

    @staticmethod
    def _count(
        changed: dict[Pair, int], others: np.ndarray, token: int, weight: np.ndarray, *, token_is_second: bool
    ) -> None:
        for other, change in _add_up(others, weight).items():
            pair = (other, token) if token_is_second else (token, other)
            changed[pair] = changed.get(pair, 0) + change


def _add_up(keys: np.ndarray, weight: np.ndarray) -> dict[int, int]:
    """Sum of the weights of each key."""
    distinct, place = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(sums, place, weight)
    return dict(zip(distinct.tolist(), sums.tolist(), strict=True))
