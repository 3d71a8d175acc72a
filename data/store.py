"""Token arrays of one side of a corpus, in memory, or in files of the cache or of shards."""

from __future__ import annotations

import functools
import json
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.arrays import ArrayWriter, map_array
from data.cache import file_digest, write_atomic
from data.corpus import Document, Marker
from data.errors import DataError
from data.held import Held
from data.shard_text import InShards
from data.shards import ShardFiles, ShardTokens
from data.tokenizers import Tokenizer, spans_of, text_of

ARRAYS = ("tokens", "offsets", "doc_bytes")
_OF_SHARDS = ("begins", "offsets", "doc_bytes")
_OF_RAW = ("raw_begins", "raw_offsets")
_OF_LOSSY = ("lossy", "raw")
BLOCK = 1 << 20  # tokens that are counted together
MAPPED = 1 << 20  # bytes from which arrays are mapped
STAMPS = "meta.stamps"


@dataclass(frozen=True)
class TokenStore:
    """Documents as ids, one behind the other, without end-of-text.

    tokens (L,) uint16 or uint32, `ShardTokens` where they stay in their files; offsets (n_docs + 1,) int64: document
    i is offsets[i] to offsets[i + 1]; doc_bytes (n_docs,) int64: raw UTF-8 bytes. Where the tokens give back
    every text, the text itself is not kept; else raw (sum of doc_bytes,) uint8 is all of it, and lossy (n_docs,) bool
    says of which documents they do not.
    `marks` are those of the corpus. `sources`: name and documents of each source of a mixture that is scored by itself
    too, one source behind the other. `held` keeps the folder of the cache from being deleted as long as this lives.
    """

    tokens: np.ndarray | ShardTokens
    offsets: np.ndarray
    doc_bytes: np.ndarray
    tokenizer: Tokenizer
    lossy: np.ndarray | None = None
    raw: np.ndarray | ShardTokens | None = None
    marks: Mapping[str, Marker] = field(default_factory=dict)
    sources: tuple[tuple[str, int], ...] = ()
    held: Held | None = None

    @property
    def n_docs(self) -> int:
        return len(self.doc_bytes)

    @property
    def total_bytes(self) -> int:
        """Raw UTF-8 bytes of all documents."""
        return int(self.doc_bytes.sum())

    def lengths_of(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each of these documents, of the shape of their indices."""
        return self.offsets[documents + 1] - self.offsets[documents]

    def counts(self, size: int) -> np.ndarray:
        """How often each of `size` ids occurs (size,) int64, a block of the tokens at a time."""
        counts = np.zeros(size, dtype=np.int64)
        for start in range(0, len(self.tokens), BLOCK):
            counts += np.bincount(self.tokens[start : start + BLOCK], minlength=size)
        return counts

    def text(self, index: int) -> bytes:
        """The raw text of one document."""
        if self.raw is None:
            return self.said(index)
        stop = self._raw_ends[index]
        return self.raw[stop - self.doc_bytes[index] : stop].tobytes()

    @functools.cached_property
    def _raw_ends(self) -> np.ndarray:
        return np.cumsum(self.doc_bytes)

    @property
    def lossy_documents(self) -> np.ndarray:
        """Indices (k,) of the documents of which the tokens do not give the text back."""
        return np.zeros(0, dtype=np.int64) if self.lossy is None else np.flatnonzero(self.lossy)

    def raw_sizes(self, places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Raw bytes (n,) of the tokens at `places` (n,), which are `sizes` (n,) but for those of lossy documents. There
        each token has that share of the document's bytes which it has of what the tokens say: together they are all."""
        if self.lossy is None:
            return sizes
        document = np.searchsorted(self.offsets, places, side="right") - 1
        found = sizes.copy()
        for index in np.unique(document[self.lossy[document]]):
            here = document == index
            found[here] = self._shares(int(index))[places[here] - self.offsets[index]]
        return found

    def _shares(self, index: int) -> np.ndarray:
        """Bytes (tokens of the document,) int64."""
        said = self.tokenizer.token_bytes[self.tokens[self.offsets[index] : self.offsets[index + 1]]]
        total = max(int(said.sum()), 1)
        ends = np.cumsum(said) * int(self.doc_bytes[index]) // total
        return np.diff(ends, prepend=0)

    @functools.cached_property
    def marked(self) -> dict[str, np.ndarray]:
        """By the name of a mark, the tokens (L,) bool all of whose bytes it marks; none of a lossy document."""
        return {name: self._marked_by(marker) for name, marker in self.marks.items()}

    def _marked_by(self, marker: Marker) -> np.ndarray:
        found = np.zeros(len(self.tokens), dtype=bool)
        for index in np.setdiff1d(np.arange(self.n_docs), self.lossy_documents):
            place = slice(self.offsets[index], self.offsets[index + 1])
            starts, ends = spans_of(self.tokenizer, self.tokens[place]).T
            marked = marker(self.text(int(index)))
            before = np.concatenate([[0], np.cumsum(marked)])  # marked bytes before each
            found[place] = (before[ends] - before[starts] == ends - starts) & (ends > starts)
        return found

    def said(self, index: int) -> bytes:
        """What the tokens of one document say: its raw text, unless it is lossy."""
        return text_of(self.tokenizer, self.tokens[self.offsets[index] : self.offsets[index + 1]])


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenStore:
    """Encode documents in the order given."""
    ids = [tokenizer.encode(document.text) for document in documents]
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(array) for array in ids], out=offsets[1:])
    tokens = np.concatenate(ids) if ids else np.zeros(0, dtype=tokenizer.dtype)
    doc_bytes = np.array([len(document.text) for document in documents], dtype=np.int64)
    pairs = zip(documents, ids, strict=True)
    lossy = np.array([text_of(tokenizer, array) != document.text for document, array in pairs], dtype=bool)
    if not lossy.any():
        return TokenStore(tokens, offsets, doc_bytes, tokenizer)
    raw = np.frombuffer(b"".join([document.text for document in documents]), dtype=np.uint8)
    return TokenStore(tokens, offsets, doc_bytes, tokenizer, lossy, raw)


def save_stores(folder: Path, stores: dict[str, TokenStore]) -> None:
    """Write `<side>.<array>.npy` files and, last, `meta.json` with their digests. Raises OSError."""
    names = []
    for side, store in stores.items():
        for name in ARRAYS if store.lossy is None else (*ARRAYS, *_OF_LOSSY):
            names.append(f"{side}.{name}.npy")
            write = functools.partial(np.save, arr=getattr(store, name), allow_pickle=False)
            write_atomic(folder / names[-1], write)
    write_meta(folder, names)


def write_stores(folder: Path, sides: Mapping[str, Sequence[Document]], tokenizer: Tokenizer) -> None:
    """The same of documents that are encoded one by one, in the order given, and held in memory no longer than that.

    Raises:
        OSError: they cannot be written.
    """
    names = []
    for side, documents in sides.items():
        if isinstance(documents, InShards) and documents.is_of(tokenizer):
            names += _write_places(folder, side, documents)
            continue
        names += [f"{side}.{name}.npy" for name in ARRAYS]
        if _write_encoded(folder, side, documents, tokenizer):
            raw = functools.partial(_write_raw, documents=documents)
            write_atomic(folder / f"{side}.raw.npy", raw)
            names += [f"{side}.{name}.npy" for name in _OF_LOSSY]
    write_meta(folder, names)


def _write_encoded(folder: Path, side: str, documents: Sequence[Document], tokenizer: Tokenizer) -> bool:
    """Whether the tokens of some document do not give its text back, in which case `lossy` is written too."""
    offsets = np.zeros(len(documents) + 1, dtype=np.int64)
    doc_bytes = np.zeros(len(documents), dtype=np.int64)
    lossy = np.zeros(len(documents), dtype=bool)

    def encode(file: BinaryIO) -> None:
        tokens = ArrayWriter(file, tokenizer.dtype)
        for index, document in enumerate(documents):
            ids = tokenizer.encode(document.text)
            tokens.append(ids)
            offsets[index + 1], doc_bytes[index] = tokens.length, len(document.text)
            lossy[index] = text_of(tokenizer, ids) != document.text
        tokens.close()

    write_atomic(folder / f"{side}.tokens.npy", encode)
    small = {"offsets": offsets, "doc_bytes": doc_bytes, **({"lossy": lossy} if lossy.any() else {})}
    for name, array in small.items():
        path = folder / f"{side}.{name}.npy"
        write_atomic(path, functools.partial(np.save, arr=array, allow_pickle=False))
    return bool(lossy.any())


def _write_places(folder: Path, side: str, documents: InShards) -> list[str]:
    """Of documents whose ids stay where they are: names of the files that say where."""
    names = [f"{side}.shards.json", *(f"{side}.{name}.npy" for name in _OF_SHARDS)]
    write_atomic(folder / names[0], functools.partial(_write_json, documents.files.to_json()))
    for name in _OF_SHARDS:
        write_atomic(folder / f"{side}.{name}.npy", functools.partial(_write_place, name, documents))
    if (raw := documents.raw) is not None:
        arrays = {"lossy": documents.lossy, "raw_begins": raw.begins, "raw_offsets": raw.offsets}
        names += [f"{side}.raw_shards.json", *(f"{side}.{name}.npy" for name in arrays)]
        write_atomic(folder / f"{side}.raw_shards.json", functools.partial(_write_json, raw.files.to_json()))
        for name, array in arrays.items():
            assert array is not None
            write = functools.partial(np.save, arr=array, allow_pickle=False)
            write_atomic(folder / f"{side}.{name}.npy", write)
    return names


def _write_json(content: Any, file: BinaryIO) -> None:
    file.write(json.dumps(content, indent=1).encode())


def _write_place(name: str, documents: InShards, file: BinaryIO) -> None:
    """One of `_OF_SHARDS`, some documents at a time."""
    array = ArrayWriter(file, np.int64)
    tokens = 0
    if name == "offsets":
        array.append(np.zeros(1, dtype=np.int64))
    for start in range(0, len(documents), BLOCK):
        some = np.arange(start, min(start + BLOCK, len(documents)))
        if name == "offsets":
            ends = tokens + np.cumsum(documents.lengths_of(some))
            tokens = int(ends[-1])
            array.append(ends)
        else:
            array.append((documents.begins_of if name == "begins" else documents.sizes_of)(some))
    array.close()


def _write_raw(file: BinaryIO, documents: Sequence[Document]) -> None:
    raw = ArrayWriter(file, np.uint8)
    for document in documents:
        raw.append(np.frombuffer(document.text, dtype=np.uint8))
    raw.close()


def write_meta(folder: Path, names: Sequence[str]) -> None:
    stamps, digests = {}, {}
    for name in names:
        stamps[name], digests[name] = _stamp(folder / name), file_digest(folder / name)
    meta = json.dumps({"sha256": digests}, indent=1)
    write_atomic(folder / "meta.json", lambda file: file.write(meta.encode()))
    _write_stamps(folder, stamps)


def _stamp(path: Path) -> list[int]:
    """Bytes and time of change (ns)."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _write_stamps(folder: Path, stamps: Mapping[str, list[int]]) -> None:
    """What files look like whose digests are right: they are not read again before they look otherwise."""
    text = json.dumps(stamps, indent=1)
    write_atomic(folder / STAMPS, lambda file: file.write(text.encode()))


def check_files(folder: Path) -> Mapping[str, str]:
    """The digests of what was written, by name. DataError where a file is another by now; OSError, ValueError, KeyError
    or TypeError where nothing says what was."""
    digests: Mapping[str, str] = json.loads((folder / "meta.json").read_bytes())["sha256"]
    _check(folder, digests)
    return digests


def _check(folder: Path, digests: Mapping[str, str]) -> None:
    """DataError where a file is not what was written."""
    try:
        known = dict(json.loads((folder / STAMPS).read_bytes()))
    except (OSError, ValueError, TypeError):
        known = {}
    now = {name: _stamp(folder / name) for name in digests}
    for name, digest in digests.items():
        if known.get(name) != now[name] and file_digest(folder / name) != digest:
            raise DataError(f"{name} has changed since it was written")
    if known != now:
        with suppress(OSError):  # who may not write here reads them at each start
            _write_stamps(folder, now)


def load_stores(
    folder: Path, sides: Sequence[str], tokenizer: Tokenizer, *, check: bool = True
) -> dict[str, TokenStore]:
    """What `save_stores` or `write_stores` wrote: tokens are read from their file when they are asked for, other arrays
    are mapped. `check`: read files of which size or time of change are not those that were last found right.

    Raises:
        DataError: a file is missing or its bytes are not those that were written. The caller rebuilds.
    """
    try:
        digests = json.loads((folder / "meta.json").read_bytes())["sha256"]
        if check:
            _check(folder, digests)
        return {side: _load_store(folder, side, digests, tokenizer) for side in sides}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"token cache {folder} is incomplete or damaged: {error}") from error


def _load_store(folder: Path, side: str, names: Container[str], tokenizer: Tokenizer) -> TokenStore:
    arrays: dict[str, Any] = {}
    for name in ("offsets", "doc_bytes", *_OF_LOSSY, "begins", *_OF_RAW):
        path = folder / f"{side}.{name}.npy"
        if path.name not in names:
            continue
        array = map_array(path)
        # The small ones are better in memory.
        arrays[name] = array if name == "raw" or array.nbytes > MAPPED else np.array(array)
    if "raw_begins" in arrays:
        content = json.loads((folder / f"{side}.raw_shards.json").read_bytes())
        places = [arrays.pop(name) for name in _OF_RAW]
        arrays["raw"] = ShardTokens(ShardFiles.from_json(content), *places)
    if (begins := arrays.pop("begins", None)) is not None:
        content = json.loads((folder / f"{side}.shards.json").read_bytes())
        tokens = ShardTokens(ShardFiles.from_json(content), begins, arrays["offsets"])
    else:
        tokens = ShardTokens.cached(folder / f"{side}.tokens.npy", arrays["offsets"])
    return TokenStore(tokens, **arrays, tokenizer=tokenizer)
