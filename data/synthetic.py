"""`data=synthetic`: generated text of exactly known entropy, from a Markov chain or a small grammar.

The text depends on the settings alone, never on the run's seed; `synthetic_bytes` sizes the training side
to the nearest document, and a tenth as much from another stream is held out.
"""

from __future__ import annotations

from typing import Protocol

from data.corpus import Corpus, Document, fingerprint
from data.errors import DataError
from data.grammar import DOCUMENT_SENTENCES, GrammarSource
from data.markov import DOCUMENT_SYMBOLS, MarkovSource
from naming import not_one_of

KINDS = ("markov", "grammar")


class SyntheticConfig(Protocol):
    synthetic: str  # one of KINDS
    synthetic_bytes: int
    synthetic_symbols: int  # alphabet and
    synthetic_order: int  # memory of the Markov chain


def load(cfg: SyntheticConfig) -> Corpus:
    """The corpus that the settings describe."""
    if cfg.synthetic_bytes < 1:
        raise DataError(f"synthetic_bytes is {cfg.synthetic_bytes}; it must be at least 1.")
    source: MarkovSource | GrammarSource
    if cfg.synthetic == "markov":
        source = MarkovSource(cfg.synthetic_symbols, cfg.synthetic_order)
        per_document: float = DOCUMENT_SYMBOLS
        name = f"markov text, {cfg.synthetic_symbols} symbols, order {cfg.synthetic_order}"
    elif cfg.synthetic == "grammar":
        source = GrammarSource()
        per_document = source.bytes_per_sentence * DOCUMENT_SENTENCES
        name = "grammar text"
    else:
        raise DataError(f"synthetic: {not_one_of(cfg.synthetic, KINDS)}")
    train = _documents(source, cfg.synthetic_bytes / per_document, "train", 0)
    heldout = _documents(source, cfg.synthetic_bytes / per_document / 10, "heldout", 1)
    note = f"true entropy: {source.entropy_bits_per_byte:.4f} bits per byte"
    return Corpus(name, train, heldout, fingerprint(train, heldout), (note,), source)


def _documents(source: MarkovSource | GrammarSource, count: float, side: str, stream: int) -> list[Document]:
    texts = source.sample(max(1, round(count)), stream)
    return [Document(f"{side}/{number}", text) for number, text in enumerate(texts)]
