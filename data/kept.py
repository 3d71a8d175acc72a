"""The text of a stream, written to the cache once: what is read from there on are its documents, one by one, in any
order, and never the user's files. So these are read once however often the text is needed, whatever they are packed in;
a file that changes later changes no run that goes on; and no document is in memory before it is asked for.

`<cache>/texts/<key>/`, by side: `<side>.text` all documents one behind the other; `.ends.npy` where each ends,
`.places.npy` its row in its file, `.digests.npy` sha256 of its text; `meta.json` what files, and what was left out. The
key is made of the files' paths, sizes and times of change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np

from data import unheard
from data.arrays import ArrayWriter, map_array
from data.cache import write_atomic
from data.corpus import Corpus, Document, Texts, fingerprint
from data.errors import DataError
from data.files import shown
from data.stream import Part, Row, Stream

FORMAT = 1  # part of every key: raise it when other text would be kept
SIDES = ("train", "heldout")
HELD_OUT_ONE_IN = 20
# A file that was changed this long before it was read, or less, may change again under the same time: what is kept of
# it serves this start alone.
SETTLED = 2.0  # seconds
BLOCK = 1 << 20  # bytes that are read together
NAMED = 3  # documents that a note names


class KeptText(Texts):
    """One side of a text in the cache. `parts`: the name of each file and its first document; `read`: these files."""

    holds = "text"  # what of each document is written beside the arrays: its text, or its "lengths" in ids

    def __init__(self, folder: Path, side: str, parts: Sequence[tuple[str, int]], read: Sequence[Part]):
        self._parts = parts
        self._ends = _load(folder, side, "ends")
        self._places = _load(folder, side, "places")
        self._digests = _load(folder, side, "digests")
        self._open(folder, side, read)

    def _open(self, folder: Path, side: str, read: Sequence[Part]) -> None:
        # Kept open: the folder may be deleted meanwhile.
        self._file = open(folder / f"{side}.text", "rb", buffering=0)  # noqa: SIM115
        if os.fstat(self._file.fileno()).st_size != (self._ends[-1] if len(self._ends) else 0):
            raise ValueError(f"{self._file.name} has another size than its documents")

    def sizes_of(self, documents: np.ndarray) -> np.ndarray:
        every = self._of_all(documents)
        ends = self._ends[every]
        return ends - np.where(every > 0, self._ends[every - 1], 0)

    def _document(self, document: int) -> Document:
        return Document(self._name(document), self._text(document, self._size(document)))

    def _size(self, document: int) -> int:
        """Of one of all documents."""
        return int(self._ends[document]) - (int(self._ends[document - 1]) if document else 0)

    def _text(self, document: int, size: int) -> bytes:
        """Of one of all documents, whichever are chosen."""
        return self._read(int(self._ends[document]) - size, size)

    def __iter__(self) -> Iterator[Document]:
        if self._chosen is not None:
            yield from (self[index] for index in range(len(self)))
            return
        first = 0
        while first < len(self):
            start = int(self._ends[first]) - self._size(first)
            behind = max(first + 1, int(np.searchsorted(self._ends, start + BLOCK, side="right")))
            block = self._read(start, int(self._ends[behind - 1]) - start)
            begin = 0
            for document in range(first, behind):
                end = int(self._ends[document]) - start
                yield Document(self._name(document), block[begin:end])
                begin = end
            first = behind

    def _read(self, start: int, size: int) -> bytes:
        parts, missing = [], size
        while missing:  # one read gives 2 GiB at most
            parts.append(os.pread(self._file.fileno(), missing, start + size - missing))
            if not parts[-1]:
                raise DataError(f"{self._file.name} has changed since it was written. Delete its folder")
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _name(self, document: int) -> str:
        part = bisect_right(self._parts, document, key=lambda part: part[1]) - 1
        return f"{self._parts[part][0]}:{self._places[document]}"


def keep_text(stream: Stream, cache: Path, tell: Callable[[str], object] = unheard) -> Corpus:
    """The corpus of a stream, whose text is written to the cache unless it is there.

    Raises:
        DataError: a part cannot be read or changes meanwhile, no fair split can be made, or there is no room.
    """
    before = {side: [part.stamps() for part in parts] for side, parts in _sides(stream)}
    key = _key(stream, before)
    folder = cache / "texts" / key[:32]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):  # several processes of a run: the first one writes
            corpus = _kept(stream, folder)
            if corpus is None:
                _write(stream, folder, before, tell)
                corpus = _kept(stream, folder, fresh=True)
    except OSError as error:
        raise DataError(
            f"the text of {stream.name} cannot be kept in {folder.parent}: {error.strerror or error}. "
            f"data={stream.read_as['source']} needs room there for its text and its tokens: set "
            f"MYTRAINER_CACHE=<folder with room>"
        ) from error
    assert corpus is not None
    return corpus


def _sides(stream: Stream) -> list[tuple[str, Sequence[Part]]]:
    """Held-out parts come first, as training leaves out what they hold."""
    return [("heldout", stream.heldout or ()), ("train", stream.train)]


def _key(stream: Stream, stamps: dict[str, Any]) -> str:
    named = {side: [part.name for part in parts] for side, parts in _sides(stream)}
    read_as = {
        **stream.read_as,
        **({"chats": True} if stream.chats else {}),
        "by_hash": stream.by_hash,
        "split": stream.heldout is None,
    }
    told = json.dumps([FORMAT, read_as, named, stamps], sort_keys=True)
    return hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()


def _kept(stream: Stream, folder: Path, *, fresh: bool = False) -> Corpus | None:
    """What is in the cache, None where that is nothing or cannot be trusted; `fresh`: it was written just now."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if not (fresh or (meta["settled"] and meta["files"] == _stamps_of(folder, meta["files"]))):
            return None
        sides = _sides_kept(stream, folder, meta["parts"])
    except (OSError, ValueError, KeyError, TypeError):
        if fresh:
            raise
        return None
    if _class(stream).holds == "text":
        place = f"text kept in the cache: {meta['bytes']:,} bytes in {folder}"
    else:
        size = sum(path.stat().st_size for path in folder.iterdir())
        place = f"where the documents lie kept in the cache: {size:,} bytes in {folder}"
    notes = (*stream.notes, *meta["notes"], place)
    return Corpus(
        stream.name, sides["train"], sides["heldout"], meta["fingerprint"], notes, chats=stream.chats
    )


def _stamps_of(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Bytes and time of change (ns) of what was written: where either is another now, the text is read anew."""
    found = {name: (folder / name).stat() for name in names}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}


def _class(stream: Stream) -> type[KeptText]:
    return stream.kept or KeptText


def _sides_kept(stream: Stream, folder: Path, parts: Any) -> dict[str, KeptText]:
    """`parts`: by side."""
    read = [part for _, side in _sides(stream) for part in side]
    kept = _class(stream)
    return {side: kept(folder, side, [(name, first) for name, first in parts[side]], read) for side in SIDES}


def _load(folder: Path, side: str, name: str) -> np.ndarray:
    return map_array(folder / f"{side}.{name}.npy")


# -- writing -------------------------------------------------------------------------------------------------------


def _write(stream: Stream, folder: Path, stamps: dict[str, Any], tell: Callable[[str], object]) -> None:
    new = folder.with_name(f".{folder.name}")
    started = time.time()
    try:
        try:
            meta = _write_sides(stream, new, tell)
        finally:  # what is wrong with half a file is no news
            _require_unchanged(stream, stamps)
        newest = max((stamp[2] for side in stamps.values() for part in side for stamp in part), default=0)
        meta["settled"] = newest / 1e9 < started - SETTLED
        meta["files"] = _stamps_of(new, sorted(path.name for path in new.iterdir()))
        text = json.dumps(meta, indent=1)
        write_atomic(new / "meta.json", lambda file: file.write(text.encode()))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _require_unchanged(stream: Stream, stamps: dict[str, Any]) -> None:
    for side, parts in _sides(stream):
        for part, then in zip(parts, stamps[side], strict=True):
            if part.stamps() != then:
                raise DataError(
                    f"{shown(part.name)} was changed while it was read. Start again when it is complete"
                )


def _write_sides(stream: Stream, folder: Path, tell: Callable[[str], object]) -> dict[str, Any]:
    """All files but meta.json, whose content is returned."""
    read = _Reading(stream, folder, (), tell)
    if stream.heldout is None and not all(len(side) for side in read.sides.values()):
        # The hash holds out none or all of so few documents: the last tenth in its order is.
        order = sorted({bytes(digest) for side in SIDES for digest in _load(folder, side, "digests")})
        if len(order) < 2:
            raise DataError(_too_few(read, len(order)))
        read = _Reading(stream, folder, set(order[-max(1, len(order) // 10) :]), tell)
    read.require_fair()
    text = _sides_kept(stream, folder, {side: read.sides[side].parts for side in SIDES})
    return {
        "fingerprint": fingerprint(text["train"], text["heldout"]),
        "bytes": sum(side.bytes for side in read.sides.values()),
        "parts": {name: side.parts for name, side in read.sides.items()},
        "notes": read.notes(),
    }


def _too_few(read: _Reading, documents: int) -> str:
    left_out = f" ({'; '.join(notes)})" if (notes := read.left_out()) else ""
    if not documents:
        return f"{read.stream.name} has no text{left_out}."
    return (
        f"{read.stream.name} has one document{left_out}, and two are needed to hold one out. Add text, or name what "
        f"is held out: val_files=<files>"
    )


class _Side:
    """Files of one side that are being written."""

    def __init__(self, folder: Path, side: str, holds: str):
        self.folder, self.side = folder, side
        self.parts: list[tuple[str, int]] = []
        self.bytes = 0
        self._open = ExitStack()
        self._text: BinaryIO | None = None
        self._lengths: ArrayWriter | None = None
        if holds == "text":
            text = open(folder / f"{side}.text", "wb")  # noqa: SIM115 (`_open` closes it)
            self._text = self._open.enter_context(text)
        else:
            self._lengths = self._array(holds, np.int64)
        self._ends = self._array("ends", np.int64)
        self._places = self._array("places", np.int64)
        self._digests = self._array("digests", np.uint8, (32,))

    def _array(self, name: str, dtype: type, row: tuple[int, ...] = ()) -> ArrayWriter:
        file = open(self.folder / f"{self.side}.{name}.npy", "wb")  # noqa: SIM115 (`_open` closes it)
        self._open.enter_context(file)
        return self._open.enter_context(closing(ArrayWriter(file, dtype, row)))

    def __len__(self) -> int:
        return self._ends.length

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def begin(self, part: Part) -> None:
        self.parts.append((part.name, len(self)))

    def add(self, row: Row, text: bytes, digest: bytes) -> None:
        if self._text is not None:
            self._text.write(text)
        if self._lengths is not None:
            self._lengths.append(np.array([row.length]))
        self.bytes += len(text)
        self._ends.append(np.array([self.bytes]))
        self._places.append(np.array([row.place]))
        self._digests.append(np.frombuffer(digest, dtype=np.uint8)[None])


class _Reading:
    """A stream as it is read and written. `chosen`: digests that are held out, where it is not one in twenty."""

    def __init__(
        self, stream: Stream, folder: Path, chosen: Collection[bytes], tell: Callable[[str], object]
    ):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.stream, self._chosen, self._tell = stream, chosen, tell
        self.left: Counter[str] = Counter()  # why a row is in neither side
        self.copies: list[str] = []
        holds = _class(stream).holds
        with _Side(folder, "heldout", holds) as heldout, _Side(folder, "train", holds) as train:
            self.sides = {"heldout": heldout, "train": train}
            if stream.heldout is None:
                self._read(stream.train, self._by_hash, ())
            else:
                with heldout:  # complete before training text is compared with it
                    self._read(stream.heldout, lambda _: heldout, ())
                held = {bytes(digest) for digest in _load(folder, "heldout", "digests")}
                self._read(stream.train, lambda _: train, held)

    def _by_hash(self, digest: bytes) -> _Side:
        """By the text, so that copies of it are on one side."""
        if self._chosen:
            return self.sides["heldout" if digest in self._chosen else "train"]
        return self.sides["train" if int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN else "heldout"]

    def _read(
        self, parts: Sequence[Part], side_of: Callable[[bytes], _Side], held: Collection[bytes]
    ) -> None:
        for number, part in enumerate(parts):
            self._tell(f"reading the text ({shown(part.name)}, {number + 1} of {len(parts)})")
            for side in self.sides.values():
                side.begin(part)
            for row in part.rows():
                text = row.text
                if text is None or not text.strip():
                    self.left["null" if text is None else "empty"] += 1
                    continue
                digest = hashlib.sha256(text).digest()
                if digest not in held:
                    side_of(digest).add(row, text, digest)
                    continue
                self.left["copy"] += 1
                if len(self.copies) < NAMED:
                    self.copies.append(f"{shown(part.name)}:{row.place}")

    def require_fair(self) -> None:
        """DataError where there is nothing to train on or to score, or the hash held out most of the text."""
        train, heldout = self.sides["train"], self.sides["heldout"]
        left_out = f" ({'; '.join(notes)})" if (notes := self.left_out()) else ""
        if not len(heldout):
            raise DataError(f"val_files: there is no text in them{left_out}. Name files with text")
        if not len(train) and self.stream.train:
            raise DataError(f"{self.stream.name} has no text to train on{left_out}.")
        if self.stream.heldout is None and not self.stream.by_hash and heldout.bytes > train.bytes:
            raise DataError(
                f"{self.stream.name}: by a hash of their text {len(heldout):,} of {len(heldout) + len(train):,} "
                f"documents would be held out, {heldout.bytes / (heldout.bytes + train.bytes):.0%} of the text. Name "
                f"what is held out: val_files=<files> (val_files=[] takes these)"
            )

    def notes(self) -> list[str]:
        if not self.stream.train:
            return self.left_out()
        heldout = self.sides["heldout"]
        total = len(heldout) + len(self.sides["train"])
        if self.stream.heldout is not None:
            how = f"{len(heldout):,} documents by name"
        elif self._chosen:
            how = f"{len(heldout):,} of {total:,} documents, the last tenth by a hash of their text (few documents)"
        else:
            how = f"{len(heldout):,} of {total:,} documents by a hash of their text"
        return [f"held out: {how}, {heldout.bytes:,} bytes", *self.left_out()]

    def left_out(self) -> list[str]:
        notes = []
        without = [f"{self.left[why]:,} whose text is {why}" for why in ("null", "empty") if self.left[why]]
        if without:
            notes.append(f"left out: rows {' and '.join(without)}")
        if copies := self.left["copy"]:
            more = f" and {copies - NAMED:,} more" if copies > NAMED else ""
            named = ", ".join(self.copies)
            notes.append(f"left out of training, as the same text is held out: {named}{more}")
        return notes
