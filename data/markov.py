"""Text from a Markov chain whose entropy is known exactly: the floor that no honest score goes below.

`symbols` printable bytes, order `order`; each context's next-symbol law is drawn once from Dirichlet(0.3)
with a fixed seed. Documents of 2,000 symbols start from the stationary law.
"""

from __future__ import annotations

import math

import numpy as np

from data.errors import DataError

FIRST_SYMBOL = ord("0")  # letters and digits for small alphabets; up to "~"
SPARE_SYMBOLS = range(ord(" "), FIRST_SYMBOL)  # used when an alphabet is larger than that
MAX_SYMBOLS = 95
MAX_TABLE = 1 << 22
DOCUMENT_SYMBOLS = 2000
CONCENTRATION = 0.3
CHAIN_SEED = 2021


class MarkovSource:
    """The chain: `transitions` (contexts, V), a context being the last `order` symbols as a number in base V.

    `entropy_rate` is bits per symbol in the limit; `entropy_bits_per_byte` that of a document, whose first
    `order` symbols cost the stationary law's entropy instead.
    """

    def __init__(self, symbols: int = 32, order: int = 1):
        _check(symbols, order)
        self.symbols, self.order = symbols, order
        alphabet = [*range(FIRST_SYMBOL, ord("~") + 1), *SPARE_SYMBOLS][:symbols]
        self.alphabet = np.array(sorted(alphabet), dtype=np.uint8)
        contexts = symbols**order
        generator = np.random.default_rng([CHAIN_SEED, symbols, order])
        # The floor keeps every path possible: gamma(0.3) draws can underflow to 0.
        draws = np.maximum(generator.gamma(CONCENTRATION, size=(contexts, symbols)), 1e-9)
        self.transitions = draws / draws.sum(axis=1, keepdims=True)
        self.stationary = self._stationary_law()  # (contexts,)
        self.entropy_rate = float(self.stationary @ _entropy_bits(self.transitions))
        start = float(_entropy_bits(self.stationary[None, :])[0])
        rest = (DOCUMENT_SYMBOLS - order) * self.entropy_rate
        self.entropy_bits_per_byte = (start + rest) / DOCUMENT_SYMBOLS

    def _stationary_law(self) -> np.ndarray:
        """Power iteration on the law of contexts: drop the oldest symbol, append the next."""
        v = self.symbols
        law = np.full(len(self.transitions), 1 / len(self.transitions))
        for _ in range(100_000):
            joint = law[:, None] * self.transitions  # (contexts, V): oldest symbol leads the context's number
            following = joint.reshape(v, -1).sum(axis=0)
            following /= following.sum()
            if np.abs(following - law).sum() < 1e-14:
                return following
            law = following
        return law

    def sample(self, n_documents: int, stream: int) -> list[bytes]:
        """Documents of `DOCUMENT_SYMBOLS` bytes; different streams are independent."""
        generator = np.random.default_rng([CHAIN_SEED + 1, stream, self.symbols, self.order])
        documents: list[bytes] = []
        while len(documents) < n_documents:
            documents.extend(self._sample_block(min(1024, n_documents - len(documents)), generator))
        return documents

    def _sample_block(self, count: int, generator: np.random.Generator) -> list[bytes]:
        cumulative = np.cumsum(self.transitions, axis=1)[:, :-1]
        context = np.searchsorted(np.cumsum(self.stationary)[:-1], generator.random(count), side="right")
        text = np.empty((count, DOCUMENT_SYMBOLS), dtype=np.int64)
        for place in range(self.order):
            text[:, place] = context // self.symbols ** (self.order - 1 - place) % self.symbols
        draws = generator.random((DOCUMENT_SYMBOLS, count))
        for place in range(self.order, DOCUMENT_SYMBOLS):
            following = (cumulative[context] <= draws[place][:, None]).sum(axis=1)
            text[:, place] = following
            context = (context * self.symbols + following) % len(self.transitions)
        return [row.tobytes() for row in self.alphabet[text]]

    def nats(self, text: bytes) -> float:
        """-ln p of a document that starts from the stationary law; infinite with a foreign byte in it."""
        symbols = np.searchsorted(self.alphabet, raw := np.frombuffer(text, dtype=np.uint8))
        if (self.alphabet[np.minimum(symbols, self.symbols - 1)] != raw).any():
            return math.inf
        if len(symbols) < self.order:  # a document cut short: the marginal law of its few symbols
            law = self.stationary.reshape((self.symbols,) * self.order)
            return float(-np.log(law[tuple(symbols)].sum()))
        context = np.zeros(len(symbols) - self.order + 1, dtype=np.int64)
        for place in range(self.order):
            context = context * self.symbols + symbols[place : place + len(context)]
        following = self.transitions[context[:-1], symbols[self.order :]]
        return float(-np.log(self.stationary[context[0]]) - np.log(following).sum())


def _entropy_bits(laws: np.ndarray) -> np.ndarray:
    """Entropy of each row in bits, with 0 log 0 = 0."""
    return -(laws * np.log2(np.where(laws > 0, laws, 1))).sum(axis=1)


def _check(symbols: int, order: int) -> None:
    if not 2 <= symbols <= MAX_SYMBOLS:
        raise DataError(f"synthetic_symbols is {symbols}; allowed are 2 to {MAX_SYMBOLS} (printable bytes).")
    if order < 1:
        raise DataError(f"synthetic_order is {order}; it must be at least 1.")
    if symbols ** (order + 1) > MAX_TABLE:
        largest = int(math.log(MAX_TABLE, symbols) + 1e-9) - 1
        fewer = int(MAX_TABLE ** (1 / (order + 1)) + 1e-9)
        nearest = [f"synthetic_order={largest}"] if largest >= 1 else []
        nearest += [f"synthetic_symbols={min(fewer, MAX_SYMBOLS)}"] if fewer >= 2 else []
        raise DataError(
            f"synthetic_symbols={symbols} with synthetic_order={order} needs a table of "
            f"{symbols}^{order + 1} entries; the limit is {MAX_TABLE:,}. Nearest: {' or '.join(nearest)}."
        )
