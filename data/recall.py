"""Associative recall: pairs of a key and a value, and far behind them some keys again, whose values are to be told.

A document is `pairs` pairs, filler, `queries` of the pairs again in any order, and filler to its end:

    c4h1a9f4................h1f4....

Behind a repeated key the value is certain to whoever remembers the pair; without, it is one of `values` equally
likely ones. Each key is asked for once, so no later copy of a pair stands nearer than `min_distance`.

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
    """The law of such documents. `distance` of a value is that between the two places where it stands, in bytes.

    pairs P, queries Q <= P, keys K >= P and values V >= 2 of an alphabet of 93 printable bytes. Keys of a document are
    drawn without replacement, values with, the queries uniformly in their order, the filler's length uniformly among
    all that keep every distance in [min_distance, max_distance]. Every document has `max_distance` + 2 bytes.

    Raises:
        DataError: the settings contradict each other; says the nearest that do not.
    """

    best_accuracy = 1.0  # of the answers, where a model sees the whole document

    def __init__(
        self, pairs: int, queries: int, keys: int, values: int, min_distance: int, max_distance: int
    ):
        _check(pairs, queries, keys, values, min_distance, max_distance)
        self.pairs, self.queries, self.n_keys, self.n_values = pairs, queries, keys, values
        self.keys = np.frombuffer(SYMBOLS[:keys].encode(), dtype=np.uint8)
        self.values = np.frombuffer(SYMBOLS[len(SYMBOLS) - values :].encode(), dtype=np.uint8)
        self.document_bytes = max_distance + 2
        # The last pair may be asked for first, the first one last.
        self.shortest, self.longest = min_distance - 2, max_distance + 2 - 2 * (pairs + queries)
        self.bits_per_document = (
            math.log2(math.perm(keys, pairs))
            + math.log2(math.perm(pairs, queries))
            + pairs * math.log2(values)
            + math.log2(self.longest - self.shortest + 1)
        )
        self.entropy_bits_per_byte = self.bits_per_document / self.document_bytes
        self.chance_accuracy = 1 / values  # of a model that does not see the pairs

    @functools.cached_property
    def values_accuracy(self) -> float:
        """Of a model that knows a document's values but not their keys; estimated from documents, to about 0.01."""
        right = 0
        for text in (texts := self.sample(4000, VALUES_STREAM)):
            left = Counter(text[1 : 2 * self.pairs : 2])
            for place in np.flatnonzero(self.answers(text)):
                right += left.most_common(1)[0][0] == text[place]
                left[text[place]] -= 1
        return right / (len(texts) * self.queries)

    def sample(self, n_documents: int, stream: int) -> list[bytes]:
        """Documents of `document_bytes`; different streams are independent."""
        generator = np.random.default_rng([TEXT_SEED, stream, self.pairs, self.n_keys, self.n_values])
        keys = self.keys[_permutations(n_documents, self.n_keys, generator)[:, : self.pairs]]
        values = self.values[generator.integers(self.n_values, size=keys.shape)]
        pairs = np.stack([keys, values], axis=2)  # (N, P, 2)
        chosen = _permutations(n_documents, self.pairs, generator)[:, : self.queries]
        queries = np.take_along_axis(pairs, chosen[:, :, None], axis=1)  # (N, Q, 2)
        asked = 2 * self.pairs + generator.integers(self.shortest, self.longest + 1, size=(n_documents, 1))
        text = np.full((n_documents, self.document_bytes), FILLER, dtype=np.uint8)
        text[:, : 2 * self.pairs] = pairs.reshape(n_documents, -1)
        np.put_along_axis(text, asked + np.arange(2 * self.queries), queries.reshape(n_documents, -1), axis=1)
        return [row.tobytes() for row in text]

    def nats(self, text: bytes) -> float:
        """-ln p of a document; infinite for any other text."""
        return self.bits_per_document * math.log(2) if self._asked(text) is not None else math.inf

    def answers(self, text: bytes) -> np.ndarray:
        """(bytes of the text,) bool: the values that are certain from what stands before them; none in text that is no
        document."""
        found = np.zeros(len(text), dtype=bool)
        if (asked := self._asked(text)) is not None:
            found[asked + 1 : asked + 2 * self.queries : 2] = True
        return found

    def _asked(self, text: bytes) -> int | None:
        """Where the first question stands; None if the text is no document."""
        size = 2 * self.pairs
        told, rest = text[:size], text[size:].lstrip(bytes([FILLER]))
        asked, gap = rest[: 2 * self.queries], len(text) - size - len(rest)
        pairs = {told[place : place + 2] for place in range(0, size, 2)}
        repeated = {asked[place : place + 2] for place in range(0, len(asked), 2)}
        lawful = (
            len(text) == self.document_bytes
            and self.shortest <= gap <= self.longest
            and len(asked) == 2 * self.queries
            and len(repeated) == self.queries
            and repeated <= pairs
            and set(told[::2]) <= set(self.keys.tolist())
            and set(told[1::2]) <= set(self.values.tolist())
            and len(set(told[::2])) == self.pairs
            and set(rest[2 * self.queries :]) <= {FILLER}
        )
        return size + gap if lawful else None


def _permutations(count: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """(count, size): permutations, uniform and independent."""
    return generator.permuted(np.tile(np.arange(size), (count, 1)), axis=1)


def _check(pairs: int, queries: int, keys: int, values: int, min_distance: int, max_distance: int) -> None:
    if queries > pairs:
        raise DataError(
            f"synthetic_queries is {queries}, more than synthetic_pairs={pairs}, each asked for at most once. "
            f"Nearest: synthetic_queries={pairs}."
        )
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
    if max_distance < (least := min_distance + 2 * (pairs + queries) - 4):
        raise DataError(
            f"synthetic_max_distance is {max_distance}, too little for {pairs} pairs and {queries} queries from "
            f"synthetic_min_distance={min_distance} on, as any pair may be asked for first. "
            f"Nearest: synthetic_max_distance={least}."
        )
