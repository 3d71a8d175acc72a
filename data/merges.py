"""Learning the merges of a byte-level BPE, in time that does not depend on how long words are or how many pairs differ.

All distinct words stand behind one another in one array of symbols, linked to their neighbours. A merge looks at the
places of the rarer of its two tokens and touches those where the pair stands, so that a million letters without a blank
(DNA, Chinese, base64) cost what a million letters of prose do.

A pair has all its places when its newer token comes into being, and only loses some after that. So what was once its
count bounds what is left of it, and a pair is looked at alone when it comes to the front: of a text in which nearly all
pairs differ, millions never are. A heap finds the one in front. It holds one by one those whose count is in reach, and
of the others one entry for all that came with a token.
"""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np

MIN_COUNT = 2  # a pair seen once is a quotation, not a regularity
GONE = -1  # a place whose symbol is part of the one before it; the neighbour of a word's end
RARE = 0  # the number that all pairs share which were never seen `MIN_COUNT` times
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
    count, and `pair`, the number of the pair that begins there. `places` of a token (m,), ascending, may hold some where
    it stands no longer. By the number of a pair: `tokens` (.., 2), `counts` (..,), and `bounds` (..,), what these were once.
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
        self.pairs = RARE + 1  # how many have numbers
        self.tokens = np.zeros((1 << 17, 2), dtype=np.int32)
        self.counts, self.bounds = np.zeros((2, 1 << 17), dtype=np.int64)
        # (-count, bytes of both, (number, 0)), or (-count, nothing, nothing, (first and last number of many)).
        self.heap: list[tuple[int, bytes, bytes, tuple[int, int]]] = []
        self._number_pairs_of_bytes()

    def _number_pairs_of_bytes(self) -> None:
        """Some places at a time: what is made of them takes many times their memory."""
        counts, number = np.zeros(1 << 16, dtype=np.int64), np.zeros(1 << 16, dtype=np.int32)
        self.pair = np.zeros(len(self.symbol), dtype=np.int32)
        stretches = [
            start + np.flatnonzero(self.behind[start : start + AT_A_TIME] != GONE)
            for start in range(0, len(self.symbol), AT_A_TIME)
        ]
        for place in stretches:
            np.add.at(counts, self.symbol[place] * 256 + self.symbol[place + 1], self.weight[place])
        found = np.flatnonzero(counts)
        number[found] = self._number(np.stack(np.divmod(found, 256), axis=1), counts[found])
        for place in stretches:
            self.pair[place] = number[self.symbol[place] * 256 + self.symbol[place + 1]]

    def _number(self, tokens: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Numbers (k,) for new pairs of tokens (k, 2): of the more frequent ones smaller numbers."""
        numbers = np.full(len(counts), RARE, dtype=np.int32)
        often = np.flatnonzero(counts >= MIN_COUNT)
        if not len(often):
            return numbers
        often = often[np.argsort(-counts[often], kind="stable")]
        first, behind = self.pairs, self.pairs + len(often)
        if behind > len(self.counts):
            self._grow(behind)
        self.tokens[first:behind] = tokens[often]
        self.counts[first:behind] = self.bounds[first:behind] = counts[often]
        numbers[often] = np.arange(first, behind)
        self.pairs = behind
        self._call(first, behind)
        return numbers

    def _grow(self, size: int) -> None:
        more = max(len(self.counts) // 2, size - len(self.counts))
        self.tokens, self.counts, self.bounds = (
            np.concatenate([array, np.zeros((more, *array.shape[1:]), dtype=array.dtype)])
            for array in (self.tokens, self.counts, self.bounds)
        )

    def _call(self, first: int, behind: int) -> None:
        """Have the pairs from one number to another looked at when the bound of the first of them is in reach."""
        heapq.heappush(self.heap, (-int(self.bounds[first]), b"", b"", (first, behind)))

    def _admit(self, first: int, behind: int) -> None:
        """Put those of them that have the bound of the first one into the heap."""
        same = np.searchsorted(-self.bounds[first:behind], -self.bounds[first], side="right")
        for pair in range(first, first + int(same)):
            self._push(pair)
        if first + same < behind:
            self._call(first + int(same), behind)

    def _push(self, pair: int) -> None:
        if (count := int(self.counts[pair])) >= MIN_COUNT:
            heapq.heappush(self.heap, (-count, *self.spelled(pair), (pair, pair)))

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
        left = self._where(*self.tokens[pair].tolist())
        right = self.behind[left]
        before, behind, weight = self.before[left], self.behind[right], self.weight[left]
        self.symbol[left], self.symbol[right] = token, GONE
        # A neighbour may be part of this merge too: the pair between the two is counted by the left one of them.
        lost = (before != GONE) & (self.symbol[before] != GONE)
        inside = behind != GONE
        np.subtract.at(self.counts, self.pair[before[lost]], weight[lost])
        np.subtract.at(self.counts, self.pair[right[inside]], weight[inside])

        self.behind[left] = behind
        self.before[behind[inside]] = left[inside]
        self.places[token] = left
        before = self.before[left]
        come = (before != GONE) & (self.symbol[before] != token)
        place = np.concatenate([before[come], left[inside]])  # where new pairs begin
        keys = np.concatenate([2 * self.symbol[before[come]], 2 * self.symbol[behind[inside]] + 1])
        keys, which = np.unique(keys, return_inverse=True)
        counts = np.zeros(len(keys), dtype=np.int64)
        np.add.at(counts, which, self.weight[place])
        others, is_behind = np.divmod(keys, 2)
        tokens = np.where(is_behind[:, None] == [0, 1], others[:, None], token)  # (k, 2)
        self.pair[place] = self._number(tokens, counts)[which]

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
