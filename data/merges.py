"""Learning the merges of a byte-level BPE, in time that depends neither on how long words are nor on how many pairs
differ.

All distinct words stand behind one another in one array of symbols, linked to their neighbours, so that a million
letters without a blank (DNA, Chinese, base64) cost what a million letters of prose do.

A pair has all its places when its newer token comes into being, and only loses some after that. They are kept from then
on: a place is looked at when a pair is made there and when that pair is merged, a few times for each byte in all. And
what was once its count bounds what is left of it, so that a pair is looked at alone when it comes to the front: of a
text in which nearly all pairs differ, millions never are. A heap finds the one in front. It holds one by one those
whose count is in reach, and of the others one entry for all that came with a token.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import Counter

import numpy as np

MIN_COUNT = 2  # a pair seen once is a quotation, not a regularity
GONE = -1  # a place whose symbol is part of the one before it; the neighbour of a word's end
RARE = 0  # the number of all pairs that were never seen `MIN_COUNT` times, and of a place where none begins
AT_A_TIME = 1 << 20  # places


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
        vocabulary.append(b"".join(table.spelled(pair)))
        table.merge(pair, len(vocabulary) - 1)
    return vocabulary


class _PairTable:
    """Adjacent pairs over the distinct words with their counts, kept up to date under merges.

    Arrays by place (n,): `symbol`, the place before and behind (`before`, `behind`; GONE at a word's ends), the word's
    count, and `pair`, the number of the pair that begins there.
    By number: `tokens` (.., 2) of a pair; `counts` (..,), and `bounds` (..,), what these were once; `lies` (.., 2),
    where its places begin and end in those that are kept with its newer token. `firsts`: of such `places` the first
    number.
    """

    def __init__(self, words: Counter[str], vocabulary: list[bytes]):
        self.vocabulary = vocabulary
        encoded = [word.encode("utf-8") for word in words]
        lengths = np.array([len(word) for word in encoded])
        self.symbol = np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.int32)
        self.weight = np.repeat(np.array(list(words.values()), dtype=np.uint32), lengths)
        self.behind = np.arange(1, len(self.symbol) + 1, dtype=np.int32)
        self.before = self.behind - 2
        ends = np.cumsum(lengths[lengths > 0])
        self.behind[ends - 1] = GONE
        self.before[(ends - lengths[lengths > 0])] = GONE
        self.pair = np.full(len(self.symbol), RARE, dtype=np.int32)

        self.numbers = RARE + 1  # that are taken
        self.tokens, self.lies = np.zeros((2, 1 << 17, 2), dtype=np.int32)
        self.counts, self.bounds = np.zeros((2, 1 << 17), dtype=np.int64)
        self.places: list[np.ndarray] = []
        self.firsts: list[int] = []
        # (-count, bytes of both, (number, 0)), or (-count, nothing, nothing, (first number of many, behind the last)).
        self.heap: list[tuple[int, bytes, bytes, tuple[int, int]]] = []
        codes, places, starts = _grouped(self._pairs_of_bytes())
        self._number(np.stack(np.divmod(codes, 256), axis=1), places, starts)

    def _pairs_of_bytes(self) -> np.ndarray:
        """(256 * first + second, place) of each (m, 2), some places at a time, as what is made of them takes many times
        their memory."""
        found = np.empty((int((self.behind != GONE).sum()), 2), dtype="<i4")
        done = 0
        for start in range(0, len(self.symbol), AT_A_TIME):
            place = start + np.flatnonzero(self.behind[start : start + AT_A_TIME] != GONE)
            here = found[done : done + len(place)]
            here[:, 0], here[:, 1] = place, self.symbol[place] * 256 + self.symbol[place + 1]
            done += len(place)
        return found

    def _number(self, tokens: np.ndarray, places: np.ndarray, starts: np.ndarray) -> None:
        """Give numbers to new pairs of tokens (k, 2), to more frequent ones smaller numbers. `places` (m,) are those of
        all of them, of each from `starts` (k,) on."""
        counts = np.add.reduceat(self.weight[places], starts, dtype=np.int64)
        sizes = np.diff(starts, append=len(places))
        often = np.flatnonzero(counts >= MIN_COUNT)
        often = often[np.argsort(-counts[often], kind="stable")]
        first, behind = self.numbers, self.numbers + len(often)
        numbers = np.full(len(counts), RARE, dtype=np.int32)
        numbers[often] = np.arange(first, behind)
        self.pair[places] = np.repeat(numbers, sizes)
        if not len(often):
            return
        if behind > len(self.counts):
            self._grow(behind)
        self.numbers = behind
        self.firsts.append(first)
        self.places.append(places[np.repeat(numbers != RARE, sizes)])
        ends = np.cumsum(np.where(numbers != RARE, sizes, 0))[often]
        self.tokens[first:behind] = tokens[often]
        self.lies[first:behind] = np.stack([ends - sizes[often], ends], axis=1)
        self.counts[first:behind] = self.bounds[first:behind] = counts[often]
        self._call(first, behind)

    def _grow(self, size: int) -> None:
        more = max(len(self.counts) // 2, size - len(self.counts))
        self.tokens, self.lies, self.counts, self.bounds = (
            np.concatenate([array, np.zeros((more, *array.shape[1:]), dtype=array.dtype)])
            for array in (self.tokens, self.lies, self.counts, self.bounds)
        )

    def _call(self, first: int, behind: int) -> None:
        """Have the pairs from one number to another looked at when the bound of the first of them is in reach."""
        heapq.heappush(self.heap, (-int(self.bounds[first]), b"", b"", (first, behind)))

    def _admit(self, first: int, behind: int) -> None:
        """Put those of them that have the bound of the first one into the heap."""
        same = int(np.searchsorted(-self.bounds[first:behind], -self.bounds[first], side="right"))
        for pair in range(first, first + same):
            self._push(pair)
        if first + same < behind:
            self._call(first + same, behind)

    def _push(self, pair: int) -> None:
        if (count := int(self.counts[pair])) >= MIN_COUNT:
            heapq.heappush(self.heap, (-count, *self.spelled(pair), (pair, 0)))

    def spelled(self, pair: int) -> tuple[bytes, bytes]:
        """The bytes of its two tokens."""
        first, second = self.tokens[pair].tolist()
        return self.vocabulary[first], self.vocabulary[second]

    def most_frequent(self) -> int | None:
        """The pair with the highest count; the smaller bytes among equals; None below `MIN_COUNT`."""
        while self.heap:
            negative_count, spelled, _, (pair, behind) = heapq.heappop(self.heap)
            if not spelled:
                self._admit(pair, behind)
            elif self.counts[pair] == -negative_count:
                return pair
            else:  # some have become parts of other tokens meanwhile
                self._push(pair)
        return None

    def merge(self, pair: int, token: int) -> None:
        """Replace the pair by `token` in every word, left to right."""
        left = self._where(pair)
        right = self.behind[left]
        before, behind = self.before[left], self.behind[right]
        weight = self.weight[left].astype(np.int64)
        self.symbol[left], self.symbol[right] = token, GONE
        # A neighbour may be part of this merge too: the pair between the two is counted by the left one of them.
        lost = (before != GONE) & (self.symbol[before] != GONE)
        inside = behind != GONE
        np.subtract.at(self.counts, self.pair[before[lost]], weight[lost])
        np.subtract.at(self.counts, self.pair[right[inside]], weight[inside])

        self.behind[left] = behind
        self.before[behind[inside]] = left[inside]
        self.pair[left] = self.pair[right] = RARE
        before = self.before[left]
        come = (before != GONE) & (self.symbol[before] != token)
        new = np.empty((int(come.sum() + inside.sum()), 2), dtype="<i4")
        new[:, 0] = np.concatenate([before[come], left[inside]])
        new[:, 1] = np.concatenate([2 * self.symbol[before[come]], 2 * self.symbol[behind[inside]] + 1])
        keys, places, starts = _grouped(new)
        others, is_behind = np.divmod(keys, 2)
        self._number(np.where(is_behind[:, None] == [0, 1], others[:, None], token), places, starts)

    def _where(self, pair: int) -> np.ndarray:
        """Places of its first token (m,), ascending; of overlapping ones every second."""
        begin, end = self.lies[pair]
        here = self.places[bisect_right(self.firsts, pair) - 1][begin:end]
        left = here[self.pair[here] == pair]
        first, second = self.tokens[pair]
        if first != second:
            return left
        # In a run of n equal symbols the 1st, 3rd, ... begin a pair.
        number = np.arange(len(left))
        begins = np.ones(len(left), dtype=bool)
        begins[1:] = self.behind[left[:-1]] != left[1:]
        return left[(number - np.maximum.accumulate(np.where(begins, number, 0))) % 2 == 0]


def _grouped(found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of (place, key) (m, 2), which it puts into order: distinct keys (k,), and the places (m,), ascending for each
    key, of which its own begin at `starts` (k,)."""
    found.view("<i8").sort(axis=0)  # as one number each, whose upper half is the key
    places, keys = found[:, 0].copy(), found[:, 1]
    starts = np.flatnonzero(np.concatenate([keys[:1] >= 0, keys[1:] != keys[:-1]]))
    return keys[starts], places, starts
