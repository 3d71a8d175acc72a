"""Associative recall: pairs of a key and a value, and behind them, round after round, all keys again in other orders,
whose values are to be told.

A document is `pairs` pairs, then `rounds` times filler and the pairs in any order, and filler to its end:

    c4h1a9f4......h1f4c4a9.....a9c4f4h1..

Behind a repeated key the value is certain to whoever remembers the pair; without, it is one of `values` equally
likely ones. No earlier copy of a pair stands nearer than `min_distance`. Rounds are what models learn from: with one
alone a document has few answers beside its filler, and small models were not seen to learn it in thousands of steps.

Well above chance is not yet recall: whoever knows which values a document has, but not whose they are, says the
commonest that is left (`values_accuracy`). Small transformers learn that first and may stay with it. (Arora et al.
2023, "Zoology", arXiv:2312.04927: multi-query associative recall, here at distances that are given.)
"""

from __future__ import annotations

import functools
import math
import string
from collections import Counter

import numpy as np

from data.errors import DataError

FILLER = ord(".")
SYMBOLS = string.ascii_letters + string.punctuation.replace(".", "") + string.digits
TEXT_SEED = 2023
VALUES_STREAM = 2  # besides those of the training and the held-out text


class RecallSource:
    """The law of such documents. `distance` of a value is that between the place where it is to be told and the nearest
    before where it stands, in bytes.

    pairs P, keys K >= P and values V >= 2 of an alphabet of 93 printable bytes. Keys of a document are drawn without
    replacement, values with, the order of every round uniformly, the filler's length before it uniformly among all
    that keep every distance in [min_distance, max_distance]. Every document is of one length.

    Raises:
        DataError: the settings contradict each other; says the nearest that do not.
    """

    best_accuracy = 1.0  # of the answers, where a model sees the whole document

    def __init__(self, pairs: int, rounds: int, keys: int, values: int, min_distance: int, max_distance: int):
        _check(pairs, keys, values, min_distance, max_distance)
        self.pairs, self.rounds, self.n_keys, self.n_values = pairs, rounds, keys, values
        self.keys = np.frombuffer(SYMBOLS[:keys].encode(), dtype=np.uint8)
        self.values = np.frombuffer(SYMBOLS[len(SYMBOLS) - values :].encode(), dtype=np.uint8)
        # The last pair of a round may be the first of the next, the first one the last.
        self.shortest, self.longest = min_distance - 2, max_distance + 2 - 4 * pairs
        self.document_bytes = 2 * pairs + rounds * (self.longest + 2 * pairs)
        of_a_round = math.log2(math.factorial(pairs)) + math.log2(self.longest - self.shortest + 1)
        self.bits_per_document = (
            math.log2(math.perm(keys, pairs)) + pairs * math.log2(values) + rounds * of_a_round
        )
        self.entropy_bits_per_byte = self.bits_per_document / self.document_bytes
        self.chance_accuracy = 1 / values  # of a model that does not see the pairs

    @functools.cached_property
    def values_accuracy(self) -> float:
        """Of a model that knows a document's values but not their keys; estimated from documents, to about 0.01."""
        right = 0
        for text in (texts := self.sample(4000, VALUES_STREAM)):
            told = Counter(text[1 : 2 * self.pairs : 2])
            for places in np.flatnonzero(self.answers(text)).reshape(self.rounds, self.pairs):
                left = told.copy()
                for place in places:
                    right += left.most_common(1)[0][0] == text[place]
                    left[text[place]] -= 1
        return right / (len(texts) * self.rounds * self.pairs)

    def sample(self, n_documents: int, stream: int) -> list[bytes]:
        """Documents of `document_bytes`; different streams are independent."""
        generator = np.random.default_rng([TEXT_SEED, stream, self.pairs, self.n_keys, self.n_values])
        keys = self.keys[_permutations(n_documents, self.n_keys, generator)[:, : self.pairs]]
        values = self.values[generator.integers(self.n_values, size=keys.shape)]
        pairs = np.stack([keys, values], axis=2)  # (N, P, 2)
        text = np.full((n_documents, self.document_bytes), FILLER, dtype=np.uint8)
        text[:, : 2 * self.pairs] = pairs.reshape(n_documents, -1)
        end = np.full((n_documents, 1), 2 * self.pairs)
        for _ in range(self.rounds):
            order = _permutations(n_documents, self.pairs, generator)
            asked = np.take_along_axis(pairs, order[:, :, None], axis=1).reshape(n_documents, -1)
            places = end + generator.integers(self.shortest, self.longest + 1, size=end.shape)
            places = places + np.arange(2 * self.pairs)
            np.put_along_axis(text, places, asked, axis=1)
            end = places[:, -1:] + 1
        return [row.tobytes() for row in text]

    def nats(self, text: bytes) -> float:
        """-ln p of a document; infinite for any other text."""
        return self.bits_per_document * math.log(2) if self._asked(text) is not None else math.inf

    def answers(self, text: bytes) -> np.ndarray:
        """(bytes of the text,) bool: the values that are certain from what stands before them; none in text that is no
        document."""
        found = np.zeros(len(text), dtype=bool)
        for asked in self._asked(text) or ():
            found[asked + 1 : asked + 2 * self.pairs : 2] = True
        return found

    def _asked(self, text: bytes) -> list[int] | None:
        """Where each round begins; None if the text is no document."""
        size = 2 * self.pairs
        told, end, begins = text[:size], size, []
        lawful = (
            len(text) == self.document_bytes
            and set(told[::2]) <= set(self.keys.tolist())
            and set(told[1::2]) <= set(self.values.tolist())
            and len(set(told[::2])) == self.pairs
        )
        for _ in range(self.rounds if lawful else 0):
            begin = len(text) - len(text[end:].lstrip(bytes([FILLER])))
            gap, end = begin - end, begin + size
            lawful &= self.shortest <= gap <= self.longest and _pairs(text[begin:end]) == _pairs(told)
            begins.append(begin)
        return begins if lawful and set(text[end:]) <= {FILLER} else None


def _pairs(text: bytes) -> list[bytes]:
    """In an order that says nothing of theirs in the text."""
    return sorted(text[place : place + 2] for place in range(0, len(text), 2))


def _permutations(count: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """(count, size): permutations, uniform and independent."""
    return generator.permuted(np.tile(np.arange(size), (count, 1)), axis=1)


def _check(pairs: int, keys: int, values: int, min_distance: int, max_distance: int) -> None:
    if keys < pairs:
        raise DataError(
            f"synthetic_keys is {keys}, too few for synthetic_pairs={pairs} different keys. "
            f"Nearest: synthetic_keys={pairs}."
        )
    if values < 2:
        raise DataError(f"synthetic_values is {values}; it must be at least 2.")
    if keys + values > len(SYMBOLS):
        raise DataError(
            f"synthetic_keys={keys} and synthetic_values={values} are {keys + values} symbols; "
            f"there are {len(SYMBOLS)} (printable bytes without the filler)."
        )
    if min_distance < 2:
        raise DataError(f"synthetic_min_distance is {min_distance}; it must be at least 2.")
    if max_distance < (least := min_distance + 4 * pairs - 4):
        raise DataError(
            f"synthetic_max_distance is {max_distance}, too little for {pairs} pairs from "
            f"synthetic_min_distance={min_distance} on, as any pair may be asked for first. "
            f"Nearest: synthetic_max_distance={least}."
        )
