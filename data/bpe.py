"""Training a byte-level BPE (Sennrich et al., arXiv:1508.07909, on bytes as in GPT-2) in pure Python.

Words are counted first and every distinct word is merged once, weighted by its count; a heap with lazy
deletion finds the next pair. Seconds for a few megabytes, and deterministic: ties go to the smaller bytes.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable

import regex

# GPT-4's split pattern with digits in groups of at most two, which suits small vocabularies (nanochat).
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
MIN_COUNT = 2  # a pair seen once is a quotation, not a regularity

Pair = tuple[int, int]


def count_words(texts: Iterable[bytes]) -> Counter[str]:
    """How often each piece of the split pattern occurs (pieces are what BPE never merges across)."""
    pattern = regex.compile(SPLIT_PATTERN)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(pattern.findall(text.decode("utf-8")))
    return words


def train_ranks(words: Counter[str], size: int) -> list[bytes]:
    """Up to `size` token byte strings; a token's place is its id and its merge priority.

    The first 256 are the single bytes. Fewer than `size` come back where no pair occurs twice any more.
    """
    vocabulary = [bytes([value]) for value in range(256)]
    table = _PairTable(words, vocabulary)
    while len(vocabulary) < size and (pair := table.most_frequent()) is not None:
        # Always new bytes: merges apply everywhere, so a stretch between token ends is split one way only.
        vocabulary.append(vocabulary[pair[0]] + vocabulary[pair[1]])
        table.merge(pair, len(vocabulary) - 1)
    return vocabulary


class _PairTable:
    """Counts of adjacent pairs over the distinct words, kept up to date under merges."""

    def __init__(self, words: Counter[str], vocabulary: list[bytes]):
        self.vocabulary = vocabulary
        self.words = [list(word.encode("utf-8")) for word in words]
        self.word_counts = list(words.values())
        self.counts: dict[Pair, int] = defaultdict(int)
        self.places: dict[Pair, set[int]] = defaultdict(set)  # words that hold the pair (or once did)
        for index, (word, count) in enumerate(zip(self.words, self.word_counts, strict=True)):
            for pair in zip(word, word[1:], strict=False):
                self.counts[pair] += count
                self.places[pair].add(index)
        self.heap = [self._entry(pair) for pair in self.counts]
        heapq.heapify(self.heap)

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
        changed: set[Pair] = set()
        for index in self.places.pop(pair):
            old, count = self.words[index], self.word_counts[index]
            new = _replace(old, pair, token)
            if len(new) == len(old):
                continue
            for gone in zip(old, old[1:], strict=False):
                self.counts[gone] -= count
                changed.add(gone)
            for come in zip(new, new[1:], strict=False):
                self.counts[come] += count
                self.places[come].add(index)
                changed.add(come)
            self.words[index] = new
        self.counts.pop(pair, None)
        changed.discard(pair)
        for other in changed:
            if self.counts[other] >= MIN_COUNT:
                heapq.heappush(self.heap, self._entry(other))


def _replace(word: list[int], pair: Pair, token: int) -> list[int]:
    first, second = pair
    merged, position, last = [], 0, len(word) - 1
    while position <= last:
        if position < last and word[position] == first and word[position + 1] == second:
            merged.append(token)
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return merged
