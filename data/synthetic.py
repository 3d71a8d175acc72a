"""`data=synthetic`: generated text of exactly known entropy: a Markov chain, a small grammar, or pairs to be recalled.

The text depends on the settings alone, never on the run's seed; `synthetic_bytes` sizes the training side
to the nearest document, and a tenth as much from another stream is held out.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

from data.corpus import Corpus, Document, Marker, fingerprint
from data.errors import DataError
from data.grammar import DOCUMENT_SENTENCES, GrammarSource
from data.markov import DOCUMENT_SYMBOLS, MarkovSource
from data.recall import RecallSource
from naming import not_one_of

KINDS = ("markov", "grammar", "recall")


_Source: TypeAlias = MarkovSource | GrammarSource | RecallSource


class SyntheticConfig(Protocol):
    synthetic: str  # one of KINDS
    synthetic_bytes: int
    synthetic_symbols: int  # alphabet and
    synthetic_order: int  # memory of the Markov chain
    synthetic_pairs: int  # to be recalled, in each of
    synthetic_rounds: int
    synthetic_keys: int
    synthetic_values: int
    synthetic_min_distance: int  # bytes from a value to where it is asked for
    synthetic_max_distance: int
    train_seq_len: int


def load(cfg: SyntheticConfig) -> Corpus:
    """The corpus that the settings describe."""
    if cfg.synthetic_bytes < 1:
        raise DataError(f"synthetic_bytes is {cfg.synthetic_bytes}; it must be at least 1.")
    source: _Source
    notes: tuple[str, ...] = ()
    marks: dict[str, Marker] = {}
    if cfg.synthetic == "markov":
        source = MarkovSource(cfg.synthetic_symbols, cfg.synthetic_order)
        per_document: float = DOCUMENT_SYMBOLS
        name = f"markov text, {cfg.synthetic_symbols} symbols, order {cfg.synthetic_order}"
    elif cfg.synthetic == "grammar":
        source = GrammarSource()
        per_document = source.bytes_per_sentence * DOCUMENT_SENTENCES
        name = "grammar text"
    elif cfg.synthetic == "recall":
        source = _recall(cfg)
        per_document = source.document_bytes
        name = (
            f"recall of {source.pairs} pairs in {source.rounds} rounds at {cfg.synthetic_min_distance} to "
            f"{cfg.synthetic_max_distance} bytes"
        )
        notes = (
            f"recall_accuracy, the share of right answers, is at best {source.best_accuracy:g}; "
            f"{source.chance_accuracy:.2g} of a model that does not see the pairs, about "
            f"{source.values_accuracy:.2f} of one that knows the values but not their keys",
        )
        marks = {"recall": source.answers}
    else:
        raise DataError(f"synthetic: {not_one_of(cfg.synthetic, KINDS)}")
    train = _documents(source, cfg.synthetic_bytes / per_document, "train", 0)
    heldout = _documents(source, cfg.synthetic_bytes / per_document / 10, "heldout", 1)
    note = f"true entropy: {source.entropy_bits_per_byte:.4f} bits per byte"
    return Corpus(name, train, heldout, fingerprint(train, heldout), (note, *notes), source, marks)


def _recall(cfg: SyntheticConfig) -> RecallSource:
    source = RecallSource(
        cfg.synthetic_pairs,
        cfg.synthetic_rounds,
        cfg.synthetic_keys,
        cfg.synthetic_values,
        cfg.synthetic_min_distance,
        cfg.synthetic_max_distance,
    )
    if source.document_bytes >= cfg.train_seq_len:
        raise DataError(
            f"synthetic_rounds={cfg.synthetic_rounds} and synthetic_max_distance={cfg.synthetic_max_distance} make "
            f"documents of {source.document_bytes} bytes and their end, of which rows of "
            f"train_seq_len={cfg.train_seq_len} hold none whole. Set train_seq_len={source.document_bytes + 1}, or "
            "fewer rounds or a smaller distance."
        )
    return source


def _documents(source: _Source, count: float, side: str, stream: int) -> list[Document]:
    texts = source.sample(max(1, round(count)), stream)
    return [Document(f"{side}/{number}", text) for number, text in enumerate(texts)]
