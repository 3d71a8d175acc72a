"""Associative recall: pairs of a key and a value, and far behind them each key again, whose value is to be told.

A document is `pairs` pairs, a filler, the pairs again in another order, and filler to its end:

    c4h1a9f4................h1c4f4a9....

Behind a repeated key the value is certain to whoever remembers the pair; without, it is one of `values` equally
likely ones. Each key is asked for once, so no later copy of a pair stands nearer than `min_distance`. (Arora et al.
2023, "Zoology", arXiv:2312.04927, multi-query associative recall, at distances that are given.)
"""

from __future__ import annotations

import math
import string

import numpy as np

from data.errors import DataError

FILLER = ord(".")
SYMBOLS = string.ascii_letters + string.punctuation.replace(".", "") + string.digits
TEXT_SEED = 2023


class RecallSource:
    """The law of such documents. `distance` of a value is that between the two places where it stands, in bytes.

    pairs P, keys K >= P and values V >= 2 of an alphabet of 93 printable bytes. Keys of a document are drawn without
    replacement, values with, the order of the questions uniformly, the filler's length uniformly among all that keep
    every distance in [min_distance, max_distance]. Every document has `max_distance` + 2 bytes.

    Raises:
        DataError: the settings contradict each other; says the nearest that do not.
    """

    best_accuracy = 1.0  # of the answers, where a model sees the whole document

    def __init__(self, pairs: int, keys: int, values: int, min_distance: int, max_distance: int):
        _check(pairs, keys, values, min_distance, max_distance)
        self.pairs, self.n_keys, self.n_values = pairs, keys, values
        self.keys = np.frombuffer(SYMBOLS[:keys].encode(), dtype=np.uint8)
        self.values = np.frombuffer(SYMBOLS[len(SYMBOLS) - values :].encode(), dtype=np.uint8)
        self.document_bytes = max_distance + 2
        # The last pair may be asked for first, the first one last.
        self.shortest, self.longest = min_distance - 2, max_distance + 2 - 4 * pairs
        self.bits_per_document = (
            (math.lgamma(keys + 1) - math.lgamma(keys - pairs + 1) + math.lgamma(pairs + 1)) / math.log(2)
            + pairs * math.log2(values)
            + math.log2(self.longest - self.shortest + 1)
        )
        self.entropy_bits_per_byte = self.bits_per_document / self.document_bytes
        self.chance_accuracy = 1 / values

    def sample(self, n_documents: int, stream: int) -> list[bytes]:
        """Documents of `document_bytes`; different streams are independent."""
        generator = np.random.default_rng([TEXT_SEED, stream, self.pairs, self.n_keys, self.n_values])
        return [self._document(generator) for _ in range(n_documents)]

    def _document(self, generator: np.random.Generator) -> bytes:
        keys = generator.permutation(self.keys)[: self.pairs]
        values = self.values[generator.integers(self.n_values, size=self.pairs)]
        pairs = np.stack([keys, values], axis=1)  # (P, 2)
        text = np.full(self.document_bytes, FILLER, dtype=np.uint8)
        asked = 2 * self.pairs + int(generator.integers(self.shortest, self.longest + 1))
        text[: 2 * self.pairs] = pairs.ravel()
        text[asked : asked + 2 * self.pairs] = generator.permutation(pairs, axis=0).ravel()
        return text.tobytes()

    def nats(self, text: bytes) -> float:
        """-ln p of a document; infinite for any other text."""
        return self.bits_per_document * math.log(2) if self._asked(text) is not None else math.inf

    def answers(self, text: bytes) -> np.ndarray:
        """(bytes of the text,) bool: the values that are certain from what stands before them; none in text that is no
        document."""
        found = np.zeros(len(text), dtype=bool)
        if (asked := self._asked(text)) is not None:
            found[asked + 1 : asked + 2 * self.pairs : 2] = True
        return found

    def _asked(self, text: bytes) -> int | None:
        """Where the first question stands; None if the text is no document."""
        size = 2 * self.pairs
        told, rest = text[:size], text[size:].lstrip(bytes([FILLER]))
        asked, gap = rest[:size], len(text) - size - len(rest)
        pairs = [told[place : place + 2] for place in range(0, size, 2)]
        lawful = (
            len(text) == self.document_bytes
            and self.shortest <= gap <= self.longest
            and len(asked) == size
            and sorted(pairs) == sorted(asked[place : place + 2] for place in range(0, size, 2))
            and set(told[::2]) <= set(self.keys.tolist())
            and set(told[1::2]) <= set(self.values.tolist())
            and len(set(told[::2])) == self.pairs
            and set(rest[size:]) <= {FILLER}
        )
        return size + gap if lawful else None


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
    if max_distance < (least := min_distance + 4 * (pairs - 1)):
        raise DataError(
            f"synthetic_max_distance is {max_distance}, too little for synthetic_pairs={pairs} from "
            f"synthetic_min_distance={min_distance} on, as any pair may be asked for first. "
            f"Nearest: synthetic_max_distance={least}."
        )
