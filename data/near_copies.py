"""How much of the held-out text stands in the training text, and which held-out documents are near copies of it.

A score on text that was trained on is a memory test: it favours what remembers over what understands. `near_copies`
says what happens to held-out documents of which half or more stands in training: they are dropped, or kept with a note.

Text is cut into units: lines without indentation, blank ones left out; a line of over LONG_LINE bytes (a paragraph,
JSON, minified code, DNA) into parts that its content decides, so that an insertion moves no cut but its own. A unit
shorter than SHORTEST is told by itself and those behind it, up to that length. A unit is seen where what tells it also
stands in training; the share of a document is the bytes of its seen units. Code has about 5 % of such lines by nature
(licence heads, imports, idioms).

What this does not see is text that was wrapped anew and tables whose every row was renumbered.

Linear time: a set of what tells the held-out units, and one pass over the training text. Bounded memory: beyond
LARGEST entries every second one, then every fourth and so on, chosen by its checksum, stands for all, and shares are
estimates.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import write_atomic
from data.corpus import Corpus, Document, fingerprint, selected, sizes
from data.errors import DataError
from data.files import shown
from data.mix_texts import still_held_out

SHORTEST = 20  # bytes that tell a unit
LONG_LINE = 256
NEAR_COPY = 0.5  # share in training from which a document is one
NOTE_ABOVE = 0.05  # share of all held-out bytes in training from which people are told
LARGEST = 1_000_000
BLOCK = 1 << 20  # bytes of a text that are looked at together
WORST = 5  # documents that are named
FORMAT = 2  # of the cached file: raise it when shares would come out differently

_WINDOW = 16  # bytes that decide a cut inside a long line
_ONE_CUT_IN = 64  # such windows, on average


@dataclass(frozen=True)
class Overlap:
    """What the held-out documents share with the training text.

    `share`: of the bytes that are held out in the end; `before` dropping. `worst`: (name, bytes, share), worst first.
    `estimate`: whether a sample of the text stands for all of it.
    """

    choice: str
    share: float
    before: float
    dropped: int
    dropped_bytes: int
    worst: tuple[tuple[str, int, float], ...]
    estimate: bool

    def as_dict(self) -> dict[str, Any]:
        """JSON: what the manifest says."""
        return {
            "near_copies": self.choice,
            "share_in_training": round(self.share, 4),
            "share_in_training_before_dropping": round(self.before, 4),
            "estimate": self.estimate,
            "dropped": {"documents": self.dropped, "bytes": self.dropped_bytes},
            "worst": [
                {
                    "document": shown(name),
                    "bytes": size,
                    "share": round(share, 4),
                    "dropped": self.choice == "drop" and share >= NEAR_COPY,
                }
                for name, size, share in self.worst
            ],
        }


def heed(corpus: Corpus, choice: str, cache: Path) -> tuple[Corpus, Overlap]:
    """The corpus as `near_copies: <choice>` wants it, with a note for people, and what was measured.

    Raises:
        DataError: nothing would be left to score.
    """
    notes = list(corpus.notes)
    shares, estimate = _shares(corpus, cache, notes)
    copies = shares >= NEAR_COPY
    kept = np.arange(len(shares)) if choice == "keep" else np.flatnonzero(~copies)
    if not len(kept):
        raise DataError(
            f"near_copies=drop would leave nothing held out: of each of the {len(copies)} held-out documents half or "
            f"more stands in the training text. Set near_copies=keep, or hold out other text"
        )
    overlap = _overlap(corpus.heldout, kept, shares, choice, estimate)
    if choice == "drop":
        notes.append(f"held-out near copies of training text dropped: {_dropped(overlap)}")
    notes += noted(overlap, "the held-out text", _mend(len(copies), int(copies.sum()), overlap.dropped))
    if overlap.dropped:
        heldout = selected(corpus.heldout, kept)
        mixture = corpus.mixture and still_held_out(corpus.mixture, kept)
        text = fingerprint(corpus.train, heldout)
        corpus = replace(corpus, heldout=heldout, fingerprint=text, mixture=mixture, known_content=None)
    return replace(corpus, notes=tuple(notes)), overlap


def _overlap(
    documents: Sequence[Document], kept: np.ndarray, shares: np.ndarray, choice: str, estimate: bool
) -> Overlap:
    """`kept`: their places; `shares`: of each document."""
    size = sizes(documents)
    seen = shares * size  # bytes of each
    worst = [place for place in np.argsort(-seen, kind="stable")[:WORST] if shares[place]]
    return Overlap(
        choice=choice,
        share=float(seen[kept].sum() / size[kept].sum()),
        before=float(seen.sum() / size.sum()),
        dropped=len(size) - len(kept),
        dropped_bytes=int(size.sum() - size[kept].sum()),
        worst=tuple((documents[int(place)].name, int(size[place]), float(shares[place])) for place in worst),
        estimate=estimate,
    )


def compare(train: Sequence[Document], documents: Sequence[Document]) -> Overlap:
    """What other text than the held-out shares with a training text."""
    shares, estimate = shares_in_training(train, documents)
    return _overlap(documents, np.arange(len(documents)), np.array(shares), "keep", estimate)


def _dropped(overlap: Overlap) -> str:
    documents = f"{overlap.dropped:,} document{'s' if overlap.dropped > 1 else ''}"
    return f"{documents}, {overlap.dropped_bytes:,} bytes" if overlap.dropped else "none"


def _mend(documents: int, copies: int, dropped: int) -> str:
    """What can be done about near copies that are not dropped, if there are some."""
    if copies == dropped:
        return ""
    if copies == documents:
        return ". All of its documents are near copies: hold out other text"
    return f". near_copies=drop leaves out {copies:,} of its documents"


def noted(overlap: Overlap, text: str, mend: str = "") -> list[str]:
    """What people are told of it, if anything, and how to `mend` it."""
    if overlap.share <= NOTE_ABOVE:
        return []
    about = "about " if overlap.estimate else ""
    most = ", ".join(f"{shown(name)} ({share:.0%})" for name, _, share in overlap.worst[:3])
    return [
        f"{about}{overlap.share:.1%} of {text} also stands in the training text, which favours models that remember; "
        f"most of it in {most}{mend}"
    ]


def _shares(corpus: Corpus, cache: Path, notes: list[str]) -> tuple[np.ndarray, bool]:
    """`shares_in_training`, kept in the cache by the text."""
    path = cache / "near_copies" / f"{corpus.fingerprint[:16]}-v{FORMAT}.json"
    if path.exists():
        try:
            digest, _, text = path.read_text(encoding="utf-8").partition("\n")
            if digest != _digest(text):
                raise ValueError("it has changed since it was written")
            found = json.loads(text)
            return np.array(found["shares"], dtype=np.float64), found["estimate"]
        except (OSError, ValueError) as error:
            notes.append(f"rebuilt a damaged cache file: {path}: {error}")
    shares, estimate = shares_in_training(corpus.train, corpus.heldout)
    text = json.dumps({"shares": shares, "estimate": estimate})
    try:
        write_atomic(path, lambda file: file.write(f"{_digest(text)}\n{text}".encode()))
    except OSError as error:
        notes.append(f"what stands in training could not be cached: {error}")
    return np.array(shares, dtype=np.float64), estimate


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def shares_in_training(
    train: Iterable[Document], heldout: Sequence[Document], largest: int = LARGEST
) -> tuple[list[float], bool]:
    """Share of each held-out document's bytes in units that also stand in training, 0 to 1; whether a sample of the
    units (never more than `largest`) stands for all."""
    wanted, one_in = _sample(heldout, largest)
    seen: set[bytes] = set()
    for document in train:
        for units in _units(document.text):
            found = wanted.intersection(_told(units))
            wanted -= found  # once is enough, and each is in memory once
            seen |= found
    return [_share(document.text, seen, one_in) for document in heldout], one_in > 1


def _sample(documents: Iterable[Document], largest: int) -> tuple[set[bytes], int]:
    """What tells the units, of one in how many."""
    wanted: set[bytes] = set()
    one_in = 1
    for units in (units for document in documents for units in _units(document.text)):
        wanted.update(tell for tell in _told(units) if _chosen(tell, one_in))
        while len(wanted) > largest:
            one_in *= 2
            wanted = {tell for tell in wanted if _chosen(tell, one_in)}
    return wanted, one_in


def _chosen(tell: bytes, one_in: int) -> bool:
    return one_in == 1 or zlib.crc32(tell) % one_in == 0


def _share(text: bytes, seen: set[bytes], one_in: int) -> float:
    found = total = 0
    for units in _units(text):
        for unit, tell in zip(units, _told(units), strict=True):
            if _chosen(tell, one_in):
                total += len(unit)
                found += len(unit) if tell in seen else 0
    return found / max(total, 1)


def _units(text: bytes) -> Iterator[list[bytes]]:
    """Of a block of the text at a time, as lists of all lines of a long text would take many times its memory."""
    start = 0
    while start < len(text):
        stop = start + BLOCK
        if stop < len(text):
            stop = text.rfind(b"\n", start, stop) + 1 or stop
        yield _units_of_block(text[start:stop])
        start = stop


def _units_of_block(block: bytes) -> list[bytes]:
    units = []
    for line in block.split(b"\n"):
        if len(line) > LONG_LINE:
            units.extend(_cut(line))
        elif line := line.strip():
            units.append(line)
    return units


def _told(units: list[bytes]) -> list[bytes]:
    """What each unit is told by."""
    told = list(units)
    for place, unit in enumerate(units):
        if len(unit) < SHORTEST:
            stop = place + 1
            while len(unit) < SHORTEST and stop < len(units):
                unit += b"\n" + units[stop]
                stop += 1
            told[place] = unit
    return told


def _cut(line: bytes) -> list[bytes]:
    """Parts of a long line. A cut is behind a window of bytes whose hash says so, the first of a run of them."""
    hashes = np.frombuffer(line, dtype=np.uint8).astype(np.uint64)
    factor, width = 0x9E3779B97F4A7C15, 1
    while (
        width < _WINDOW
    ):  # hash of 2 w bytes = hash of the first w * factor + hash of the others, modulo 2^64
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        factor, width = factor * factor % 2**64, 2 * width
    mixed = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    cuts = np.flatnonzero(mixed >> np.uint64(32) & np.uint64(_ONE_CUT_IN - 1) == 0) + _WINDOW
    cuts = cuts[np.diff(cuts, prepend=-_WINDOW) >= _WINDOW].tolist()
    spans = zip([0, *cuts], [*cuts, len(line)], strict=True)
    return [line[start:stop] for start, stop in spans if start < stop]
