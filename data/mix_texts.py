"""The documents of a mixture: those of its sources, one source behind the other, on either side of the split.

What is held out of one source is left out of the training text of all. Texts that several sources have are named.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from data import corpus as corpora
from data.corpus import Corpus, Document, Texts, fingerprint
from data.errors import DataError
from data.files import shown
from data.mix import Mix

__all__ = ["MixedTexts", "Mixture", "join", "told", "weighted"]

NAMED = 3  # documents that a note names
# What a tokenizer learns from is taken of so much text at most: the largest one reads half a gigabyte.
SAMPLE_BYTES = 512 << 20


@dataclass(frozen=True)
class Mixture:
    """How a corpus is mixed. shares (stages, sources): each stage's add up to 1. `train`, `heldout`: documents of each
    source on that side, where they lie in this order."""

    names: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]
    train: tuple[int, ...]
    heldout: tuple[int, ...]

    @property
    def mean_shares(self) -> tuple[float, ...]:
        """Of the whole text that a run reads, as its stages are equally long."""
        return tuple(sum(of) / len(of) for of in zip(*self.shares, strict=True))


class MixedTexts(Texts):
    """Documents of several sources, by the name of each, one source behind the other."""

    def __init__(self, sources: Sequence[tuple[str, Sequence[Document]]]):
        self._sources = [(name, documents) for name, documents in sources if len(documents)]
        self._firsts = [0, *accumulate(len(documents) for _, documents in self._sources)]
        of = [(corpora.sizes(documents), _digests(documents)) for _, documents in self._sources]
        self._sizes = np.concatenate([np.zeros(0, dtype=np.int64), *(sizes for sizes, _ in of)])
        self._digests = np.concatenate([np.zeros((0, 32), dtype=np.uint8), *(digests for _, digests in of)])

    def sizes_of(self, documents: np.ndarray) -> np.ndarray:
        return self._sizes[self._of_all(documents)]

    def _document(self, document: int) -> Document:
        source = bisect_right(self._firsts, document) - 1
        name, documents = self._sources[source]
        return _of(name, documents[document - self._firsts[source]])

    def __iter__(self) -> Iterator[Document]:
        if self._chosen is not None:
            yield from (self[index] for index in range(len(self)))
            return
        for name, documents in self._sources:
            yield from (_of(name, document) for document in documents)


def _of(source: str, document: Document) -> Document:
    return Document(f"{source}: {document.name}", document.text)


def _digests(documents: Sequence[Document]) -> np.ndarray:
    """sha256 of each text (n, 32) uint8."""
    if isinstance(documents, Texts):
        return documents.digests
    digests = b"".join(hashlib.sha256(document.text).digest() for document in documents)
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)


def join(mix: Mix, found: Sequence[Corpus]) -> Corpus:
    """One corpus of those of the entries.

    Raises:
        DataError: a source that has a weight has no text to train on.
    """
    names = [entry.name for entry in mix.entries]
    notes = [f"{name}: {note}" for name, one in zip(names, found, strict=True) for note in one.notes]
    heldout = MixedTexts([(name, one.heldout) for name, one in zip(names, found, strict=True)])
    held = _keys(heldout.digests)
    train = []
    for entry, one in zip(mix.entries, found, strict=True):
        kept, left_out = _without(one.train, heldout, held)
        if left_out:
            notes.append(
                f"{entry.name}: left out of training, as the same text is held out: {_listed(left_out)}"
            )
        if any(entry.weights) and not len(kept):
            raise DataError(
                f"mix: {entry.name} has a weight and no text to train on"
                f"{' that is not held out' if left_out else ''}. Leave it out, or name files with text"
            )
        train.append((entry.name, kept))
        if one.marks:
            accuracies = " and ".join(f"{mark}_accuracy" for mark in one.marks)
            notes.append(f"{entry.name}: {accuracies} is not measured in a mixture")
    mixture = Mixture(
        names=tuple(names),
        shares=mix.shares,
        train=tuple(len(documents) for _, documents in train),
        heldout=tuple(len(one.heldout) for one in found),
    )
    mixed = MixedTexts(train)
    notes += _in_several(mixed, mixture)
    notes.append(_said(mixture, mixed, heldout))
    name = f"mix of {', '.join(names)}"
    return Corpus(name, mixed, heldout, fingerprint(mixed, heldout), tuple(notes), mixture=mixture)


def _said(mixture: Mixture, train: Texts, heldout: Texts) -> str:
    """Which source has which shares, and how much text."""
    ends = {side: np.cumsum(getattr(mixture, side)) for side in ("train", "heldout")}
    parts = []
    for place, name in enumerate(mixture.names):
        shares = " then ".join(f"{stage[place]:.1%}" for stage in mixture.shares)
        sizes = [
            int(texts.sizes[ends[side][place] - getattr(mixture, side)[place] : ends[side][place]].sum())
            for side, texts in (("train", train), ("heldout", heldout))
        ]
        parts.append(f"{name} {shares} ({sizes[0]:,} bytes to train on, {sizes[1]:,} held out)")
    return f"shares of bytes: {'; '.join(parts)}"


def _keys(digests: np.ndarray, first: int = 0) -> np.ndarray:
    """Eight bytes of each digest (n,) uint64, by which texts are told apart before their digests are."""
    return np.ascontiguousarray(digests[:, first : first + 8]).view(">u8")[:, 0].astype(np.uint64)


def _without(
    documents: Sequence[Document], heldout: MixedTexts, held: np.ndarray
) -> tuple[Sequence[Document], list[str]]:
    """Training documents whose text is not held out, and the names of the others."""
    digests = _digests(documents)
    found = np.flatnonzero(np.isin(_keys(digests), held)) if len(digests) else np.zeros(0, dtype=np.int64)
    texts = {bytes(digest) for digest in heldout.digests} if len(found) else set()
    copies = [int(place) for place in found if bytes(digests[place]) in texts]
    if not copies:
        return documents, []
    kept = np.delete(np.arange(len(digests)), copies)
    return corpora.selected(documents, kept), [documents[place].name for place in copies]


def _in_several(train: MixedTexts, mixture: Mixture) -> list[str]:
    """A note on texts that more than one source has, if there are some."""
    keys, source = _keys(train.digests), np.repeat(np.arange(len(mixture.train)), mixture.train)
    order = np.lexsort((source, keys))
    same = keys[order[1:]] == keys[order[:-1]]
    other = source[order[1:]] != source[order[:-1]]
    pairs = [(int(order[place]), int(order[place + 1])) for place in np.flatnonzero(same & other)]
    pairs = [(a, b) for a, b in pairs if (train.digests[a] == train.digests[b]).all()]
    if not pairs:
        return []
    named = [f"{shown(train[a].name)} is {shown(train[b].name)}" for a, b in pairs[:NAMED]]
    more = f" and {len(pairs) - NAMED:,} more" if len(pairs) > NAMED else ""
    return [f"the same text in several sources, each of which is trained on: {'; '.join(named)}{more}"]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{', '.join(shown(name) for name in names[:NAMED])}{more}"


def still_held_out(mixture: Mixture, kept: np.ndarray) -> Mixture:
    """Where of the held-out documents only those at these places (k,) are left, in their order."""
    source = np.repeat(np.arange(len(mixture.heldout)), mixture.heldout)[kept]
    counts = np.bincount(source, minlength=len(mixture.heldout))
    return replace(mixture, heldout=tuple(int(count) for count in counts))


def told(corpus: Corpus) -> tuple[str, str]:
    """Fingerprint and content of a corpus; of a mixed one also of what lies in which source, and of the weights."""
    if (mixture := corpus.mixture) is None:
        return corpus.fingerprint, corpus.content
    how = [mixture.shares, mixture.train, mixture.heldout]
    content = _hashed([corpus.content, how])
    return _hashed([content, mixture.names]), content


def _hashed(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def weighted(corpus: Corpus) -> Sequence[Document]:
    """Training text in which each source has the share that it has of the whole run: what a tokenizer learns how
    frequent words are from. Whole documents, chosen by other bytes of their hashes than `in_hash_order` reads them by;
    again and again where a source is short."""
    mixture, train = corpus.mixture, corpus.train
    if mixture is None or not isinstance(train, MixedTexts):
        return train
    total = min(int(train.sizes.sum()), SAMPLE_BYTES)
    keys, firsts = _keys(train.digests, 8), np.cumsum([0, *mixture.train])
    chosen = []
    for place, share in enumerate(mixture.mean_shares):
        documents = np.arange(firsts[place], firsts[place + 1])
        if not share or not len(documents):
            continue
        documents = documents[np.argsort(keys[documents], kind="stable")]
        ends = np.cumsum(train.sizes[documents])
        passes, rest = divmod(int(share * total), int(ends[-1]))
        chosen += [documents] * passes + [documents[: int(np.searchsorted(ends, rest, side="left")) + 1]]
    return train.select(np.concatenate(chosen))
