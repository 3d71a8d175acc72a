"""A corpus: named documents, already split into what is trained on and what is held out.

The split is a function of a document's name alone (files), its place (one long file) or its text (streams), never of
a random state, so two machines with the same files hold out the same text.
"""

from __future__ import annotations

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, overload

import numpy as np

if TYPE_CHECKING:
    from data.mix_texts import Mixture

_TOGETHER = 4096  # digests that are told, or put in order, at once
_LOOKED_AT = 1 << 17  # digests of which some are looked for

# Of a whole document: (its bytes,) bool, those that are told apart in a score.
Marker = Callable[[bytes], np.ndarray]


class Document(NamedTuple):
    """One text and the name that decides its side of the split."""

    name: str
    text: bytes


class Texts(Sequence[Document]):
    """Documents that are not in memory: each is read when it is asked for. They are told by their text alone, as how
    they lie in files says nothing of what they are; their names are for people.

    A subclass has the digests of all of them, `_digests` (n, 32) uint8: sha256 of each text.
    """

    _digests: np.ndarray
    _chosen: np.ndarray | None = None  # (k,): which of all documents, in this order; None: all

    @abstractmethod
    def _document(self, document: int) -> Document:
        """One of all documents, whichever are chosen."""

    @abstractmethod
    def sizes_of(self, documents: np.ndarray) -> np.ndarray:
        """Raw UTF-8 bytes of documents (k,): (k,) int64."""

    def select(self, indices: np.ndarray) -> Self:
        """Those of them (k,), in this order."""
        found = copy.copy(self)
        found._chosen = self._of_all(indices)
        return found

    def __len__(self) -> int:
        return len(self._digests if self._chosen is None else self._chosen)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | Sequence[Document]:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._document(int(index if self._chosen is None else self._chosen[index]))

    def _of_all(self, documents: np.ndarray) -> np.ndarray:
        """Indices among all documents, whichever are chosen."""
        return documents if self._chosen is None else self._chosen[documents]

    @property
    def digests(self) -> np.ndarray:
        """sha256 of each text (n, 32) uint8."""
        return self._digests if self._chosen is None else self._digests[self._chosen]

    @property
    def sizes(self) -> np.ndarray:
        """Raw UTF-8 bytes of each (n,) int64: 8 bytes a document in memory."""
        return self.sizes_of(np.arange(len(self)))


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
    the right one. A token is marked if all of its bytes are. `known_content`: `content`, where somebody has written it
    down.
    `mixture`: of which sources it is mixed, and how; None: it is one. `chats`: documents are chats
    (`data/chats/messages.py`).
    """

    name: str
    train: Sequence[Document]
    heldout: Sequence[Document]
    fingerprint: str
    notes: tuple[str, ...] = ()
    truth: TrueModel | None = None
    marks: Mapping[str, Marker] = field(default_factory=dict)
    known_content: str | None = None
    mixture: Mixture | None = None
    chats: bool = False

    @property
    def content(self) -> str:
        """As `fingerprint`, whatever the documents are called."""
        if self.known_content is not None:
            return self.known_content
        return self.fingerprint if isinstance(self.train, Texts) else content(self.train, self.heldout)


def is_held_out(path: str) -> bool:
    """One file in twenty, by a hash of its relative POSIX path."""
    return path_hash(path) % 20 == 0


def path_hash(path: str) -> int:
    """First 32 bits of sha256 of a relative path (surrogate escapes: names need not be valid UTF-8)."""
    return int(hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:8], 16)


def fingerprint(train: Sequence[Document], heldout: Sequence[Document]) -> str:
    """sha256 over side, name (none of `Texts`) and content digest of every document, in order."""
    digest = hashlib.sha256()
    for side, documents in (("train", train), ("heldout", heldout)):
        for name, content in _told(documents):
            digest.update(f"{side}\0{name}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def content(train: Sequence[Document], heldout: Sequence[Document]) -> str:
    """As `fingerprint`, whatever the documents are called: a run reads places and bytes, not names."""
    nameless = (
        side if isinstance(side, Texts) else [document._replace(name="") for document in side]
        for side in (train, heldout)
    )
    return fingerprint(*nameless)


def _told(documents: Sequence[Document]) -> Iterator[tuple[str, str]]:
    """Name and content digest of each."""
    if not isinstance(documents, Texts):
        yield from ((name, hashlib.sha256(text).hexdigest()) for name, text in documents)
        return
    for start in range(0, len(documents), _TOGETHER):
        digests = documents.digests[start : start + _TOGETHER].tobytes().hex()
        yield from (("", digests[place : place + 64]) for place in range(0, len(digests), 64))


def in_hash_order(documents: Sequence[Document]) -> Iterable[Document]:
    """Spread evenly over the text, whatever its order: by a hash of their names, that of their text for `Texts`."""
    if not isinstance(documents, Texts):
        return sorted(documents, key=lambda document: (path_hash(document.name), document.name))
    return (documents[int(place)] for places in _by_digest(documents.digests) for place in places)


def _by_digest(digests: np.ndarray) -> Iterator[np.ndarray]:
    """Places (n,) in the order of the first 8 bytes of digests (n, 32), those of a range of values at a time: who needs
    the first few does not sort all. Each range is twice as wide as the one before it."""
    low, width = 0, (1 << 64) * _TOGETHER // max(len(digests), _TOGETHER)
    while low < 1 << 64:
        high = min(low + width, 1 << 64)
        places, values = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.uint64)]
        for start in range(0, len(digests), _LOOKED_AT):
            first = np.ascontiguousarray(digests[start : start + _LOOKED_AT, :8]).view(">u8")[:, 0]
            chosen = np.flatnonzero((first >= np.uint64(low)) & (first <= np.uint64(high - 1)))
            places.append(chosen + start)
            values.append(first[chosen].astype(np.uint64))
        yield np.concatenate(places)[np.argsort(np.concatenate(values), kind="stable")]
        low, width = high, 2 * width


def selected(documents: Sequence[Document], indices: np.ndarray) -> Sequence[Document]:
    """Those of them (k,), in this order."""
    if isinstance(documents, Texts):
        return documents.select(indices)
    return [documents[int(index)] for index in indices]


def sizes(documents: Sequence[Document]) -> np.ndarray:
    """Raw UTF-8 bytes of each (n,) int64."""
    if isinstance(documents, Texts):
        return documents.sizes
    return np.array([len(document.text) for document in documents], dtype=np.int64)


def drop_duplicates(documents: Sequence[Document]) -> tuple[list[Document], int]:
    """Keep the first of byte-identical documents: a copy of a training file must not be held out."""
    first: dict[bytes, Document] = {}
    for document in documents:
        first.setdefault(hashlib.sha256(document.text).digest(), document)
    return list(first.values()), len(documents) - len(first)


def total_bytes(documents: Sequence[Document]) -> int:
    """Raw UTF-8 bytes of the documents together."""
    if isinstance(documents, Texts):
        return int(documents.sizes.sum())
    return sum(len(document.text) for document in documents)
