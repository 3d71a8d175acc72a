"""A corpus: named documents, already split into what is trained on and what is held out.

The split is a function of a document's name alone (files) or its place (one long file), never of a random
state, so two machines with the same files hold out the same text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

# Of a whole document: (its bytes,) bool, those that are told apart in a score.
Marker = Callable[[bytes], np.ndarray]


class Document(NamedTuple):
    """One text and the name that decides its side of the split."""

    name: str
    text: bytes


class TrueModel(Protocol):
    """The distribution that a synthetic corpus was drawn from; its score is the floor for any model."""

    entropy_bits_per_byte: float

    def nats(self, text: bytes) -> float:
        """Negative log-likelihood of one whole document; infinite where the document is impossible."""
        ...


@dataclass(frozen=True)
class Corpus:
    """Documents by side of the split, plus what a run prints and records about them.

    `fingerprint` is a sha256 over the (name, content digest) pairs of both sides: equal fingerprints mean
    comparable scores. `notes` are sentences for the user (what was skipped, how the split was made).
    `marks`: parts of documents by name, of which evaluations report `<name>_accuracy`: how often the likeliest token is
    the right one. A token is marked if all of its bytes are.
    """

    name: str
    train: list[Document]
    heldout: list[Document]
    fingerprint: str
    notes: tuple[str, ...] = ()
    truth: TrueModel | None = None
    marks: Mapping[str, Marker] = field(default_factory=dict)


def is_held_out(path: str) -> bool:
    """One file in twenty, by a hash of its relative POSIX path."""
    return path_hash(path) % 20 == 0


def path_hash(path: str) -> int:
    """First 32 bits of sha256 of a relative path (surrogate escapes: names need not be valid UTF-8)."""
    return int(hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:8], 16)


def fingerprint(train: Sequence[Document], heldout: Sequence[Document]) -> str:
    """sha256 over side, name and content digest of every document, in order."""
    digest = hashlib.sha256()
    for side, documents in (("train", train), ("heldout", heldout)):
        for name, text in documents:
            content = hashlib.sha256(text).hexdigest()
            digest.update(f"{side}\0{name}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def content(train: Sequence[Document], heldout: Sequence[Document]) -> str:
    """As `fingerprint`, whatever the documents are called: a run reads places and bytes, not names."""
    nameless = ([document._replace(name="") for document in side] for side in (train, heldout))
    return fingerprint(*nameless)


def drop_duplicates(documents: Sequence[Document]) -> tuple[list[Document], int]:
    """Keep the first of byte-identical documents: a copy of a training file must not be held out."""
    first: dict[bytes, Document] = {}
    for document in documents:
        first.setdefault(hashlib.sha256(document.text).digest(), document)
    return list(first.values()), len(documents) - len(first)


def total_bytes(documents: Sequence[Document]) -> int:
    """Raw UTF-8 bytes of the documents together."""
    return sum(len(document.text) for document in documents)
