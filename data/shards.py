"""Files of token ids as others write them, and reading them: by `pread`, never mapped, as a mapped file that is cut off
ends the process.

| kind | what it is |
| --- | --- |
| `20240520` | llm.c's for GPT-2, also modded-nanogpt's: a header of 256 int32 (magic, version 1, tokens), then uint16 |
| `20240801` | llm.c's for Llama 3: the same with version 7, then uint32 |
| `no header` | nanoGPT's: nothing but ids, uint16, or uint32 where the vocabulary needs it |
| `Megatron` | ids, and beside them an `.idx` of the same name that says where sequences and documents begin |

Sources: dev/data/data_common.py of llm.c; data/openwebtext/prepare.py of nanoGPT; core/datasets/indexed_dataset.py of
Megatron-LM.
"""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.arrays import array_header
from data.errors import DataError
from data.stream import FilePart, Stamp

__all__ = [
    "CACHED",
    "GPT2_HEADER",
    "HEADERLESS",
    "LLAMA_HEADER",
    "MEGATRON",
    "Shard",
    "ShardFiles",
    "ShardTokens",
    "header_of",
    "open_shard",
]

GPT2_HEADER, LLAMA_HEADER, HEADERLESS, MEGATRON = "20240520", "20240801", "no header", "Megatron"
CACHED = "cached"  # an array of ours
HEADER = 1024  # bytes
# Files at a time: shuffled documents lie in all of many shards, and other things are open too.
OPEN = min(max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8, 64), 2048)
NEAR = 16  # ids between documents that are read over rather than around
BLOCK = 1 << 20  # ids that are read together


class _Header(NamedTuple):
    version: int
    dtype: str


_HEADERS = {int(GPT2_HEADER): _Header(1, "<u2"), int(LLAMA_HEADER): _Header(7, "<u4")}
_OF_LLM_C = range(
    20240101, 20241232
)  # magics of its other files (weights, states, tasks): no two ids of GPT-2
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True)
class Shard:
    """One file: `length` ids of type `dtype` from byte `start` on; `size` and time of change (ns) as it was opened."""

    path: str
    kind: str
    dtype: str
    start: int
    length: int
    size: int
    changed: int

    @property
    def written(self) -> str:
        """What all shards of a run have alike."""
        return f"{self.kind}, {np.dtype(self.dtype).name}"


def open_shard(path: Path, headerless: np.dtype) -> Shard:
    """What a file holds, by how it begins and what lies beside it. `headerless`: the type of ids where nothing says it.

    Raises:
        DataError: it cannot be read, is cut off, or is none of the kinds.
    """
    ((name, size, changed),) = FilePart(path.name, path).stamps()
    if (index := index_of(path)).exists():
        dtype, lengths, _ = _read_index(index)
        held = int(lengths.sum())
        if size != held * np.dtype(dtype).itemsize:
            raise DataError(
                f"{str(path)!r} has {size:,} bytes, and {index.name} beside it says "
                f"{held * np.dtype(dtype).itemsize:,} ({held:,} tokens): one of them is cut off or another's. "
                f"Fetch both again"
            )
        return _some(Shard(name, MEGATRON, dtype, 0, held, size, changed))
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER)
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    magic = int.from_bytes(head[:4], "little") if len(head) >= 4 else 0
    if magic in _HEADERS:
        return _some(_with_header(Shard(name, str(magic), "", HEADER, 0, size, changed), head))
    if magic in _OF_LLM_C:
        raise DataError(
            f"{str(path)!r} begins with {magic}, which is no header of tokens. Those are {_known()}, or none"
        )
    width = headerless.itemsize
    if size % width:
        raise DataError(
            f"{str(path)!r} has no header, and its {size:,} bytes are no whole number of {headerless.name} ids: it is "
            f"cut off, or no file of tokens. Known headers: {_known()}"
        )
    return _some(Shard(name, HEADERLESS, f"<u{width}", 0, size // width, size, changed))


def _with_header(shard: Shard, head: bytes) -> Shard:
    known = _HEADERS[int(shard.kind)]
    if len(head) < HEADER:
        raise DataError(f"{shard.path!r} is cut off inside its header. Fetch it again")
    _, version, length = struct.unpack("<3i", head[:12])
    if version != known.version:
        raise DataError(
            f"{shard.path!r} has header {shard.kind} of version {version}, and the known one is {known.version}. Write "
            f"it again as that, or leave it out"
        )
    held, rest = divmod(shard.size - HEADER, np.dtype(known.dtype).itemsize)
    if held != length or rest:
        what = "it is cut off" if held < length else "it was appended to"
        raise DataError(
            f"{shard.path!r}: its header says {length:,} tokens, and {held:,} are there: {what}. Fetch it again"
        )
    return Shard(shard.path, shard.kind, known.dtype, HEADER, length, shard.size, shard.changed)


def header_of(kind: str, tokens: int) -> bytes:
    """The header of a file with that many tokens."""
    said = struct.pack("<3i", int(kind), _HEADERS[int(kind)].version, tokens)
    return said.ljust(HEADER, b"\0")


def _some(shard: Shard) -> Shard:
    if not shard.length:
        raise DataError(f"{shard.path!r} holds no tokens. Leave it out, or fetch it again")
    return shard


def _known() -> str:
    return " and ".join(f"{magic} ({np.dtype(header.dtype).name})" for magic, header in _HEADERS.items())


# -- Megatron's index ----------------------------------------------------------------------------------------------


def index_of(path: Path) -> Path:
    """Where the index of a file lies, if it has one."""
    return path.with_suffix(".idx")


def document_starts(path: Path) -> np.ndarray:
    """The token at which each document begins (n,) int64, as the index of a file says."""
    _, lengths, documents = _read_index(index_of(path))
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return starts[documents[:-1]]


def _read_index(path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """Type of the ids; tokens of each sequence (s,) int64; the sequence at which each document begins, and the end
    (n + 1,) int64."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    if not raw.startswith(_MEGATRON_MAGIC):
        raise DataError(
            f"{str(path)!r} lies beside a file of tokens and is no index of Megatron's. Move one of them away"
        )
    damaged = DataError(f"{str(path)!r} is damaged or cut off. Fetch it again")
    begin = len(_MEGATRON_MAGIC) + 25
    if len(raw) < begin:
        raise damaged
    version, code, sequences, documents = struct.unpack("<QBQQ", raw[begin - 25 : begin])
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise DataError(f"{str(path)!r}: version {version} with ids of type {code} is not known")
    if len(raw) < begin + 12 * sequences + 8 * documents:
        raise damaged
    lengths = np.frombuffer(raw, "<i4", sequences, begin).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, begin + 4 * sequences)
    starts = np.frombuffer(raw, "<i8", documents, begin + 12 * sequences)
    width = np.dtype(_MEGATRON_DTYPES[code]).itemsize
    # Sums of 64 bits: those of 32 wrap beyond 2 GiB.
    behind_one_another = np.array_equal(pointers, (np.cumsum(lengths) - lengths) * width)
    whole = documents > 1 and starts[0] == 0 and starts[-1] == sequences and (np.diff(starts) >= 0).all()
    if not behind_one_another or not whole or (lengths < 0).any():
        raise damaged
    return _MEGATRON_DTYPES[code], lengths, starts


# -- reading -------------------------------------------------------------------------------------------------------


class ShardFiles:
    """The ids of shards as one array, shard behind shard, of type `dtype`. A file that is not as it was opened ends the
    reading: DataError names it.

    bases (shards + 1,) int64: where each begins, and the end.
    """

    def __init__(self, shards: Sequence[Shard], dtype: np.dtype | type | str):
        self.shards, self.dtype = list(shards), np.dtype(dtype)
        self.bases = np.concatenate([[0], np.cumsum([shard.length for shard in shards], dtype=np.int64)])
        self._files: dict[int, FileIO] = {}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ShardFiles:
        return cls([Shard(**shard) for shard in content["shards"]], content["dtype"])

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype.str, "shards": [vars(shard) for shard in self.shards]}

    def __len__(self) -> int:
        return int(self.bases[-1])

    def read(self, begin: int, stop: int) -> np.ndarray:
        """Ids (stop - begin,)."""
        pieces = []
        number = int(np.searchsorted(self.bases, begin, side="right")) - 1
        while begin < stop:
            end = min(stop, int(self.bases[number + 1]))
            base = int(self.bases[number])
            pieces.append(self._read(number, begin - base, end - base))
            begin, number = end, number + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=self.dtype)

    def read_into(self, ids: np.ndarray, there: np.ndarray, begins: np.ndarray, counts: np.ndarray) -> None:
        """Put stretches of ids (K,) into `ids` (N,), each to its place there: begins, counts (K,) int64. They are read
        file by file, straight into place where files hold ids of that type."""
        first = np.searchsorted(self.bases, begins, side="right") - 1
        within = begins + counts <= self.bases[first + 1]
        target = memoryview(ids).cast("B")  # type: ignore[arg-type]
        width = ids.itemsize
        for number in np.unique(first[within]):
            here = np.flatnonzero(within & (first == number))
            shard = self.shards[number]
            places = begins[here] - self.bases[number]
            if np.dtype(shard.dtype) != ids.dtype:
                for at, place, count in zip(there[here], places, counts[here], strict=True):
                    ids[at : at + count] = self._read(int(number), int(place), int(place + count))
                continue
            at, end = (width * there[here]).tolist(), (width * (there[here] + counts[here])).tolist()
            place = (shard.start + width * places).tolist()
            with self._reading(int(number)) as file:
                handle = file.fileno()
                for start, stop, offset in zip(at, end, place, strict=True):
                    if os.preadv(handle, [target[start:stop]], offset) != stop - start:
                        raise _changed(shard)
        for piece in np.flatnonzero(~within):  # over the end of a shard
            at, begin, count = int(there[piece]), int(begins[piece]), int(counts[piece])
            ids[at : at + count] = self.read(begin, begin + count)

    def _read(self, number: int, begin: int, stop: int) -> np.ndarray:
        shard = self.shards[number]
        dtype = np.dtype(shard.dtype)
        place, missing = shard.start + begin * dtype.itemsize, (stop - begin) * dtype.itemsize
        raw = []
        with self._reading(number) as file:
            while missing:  # one read gives 2 GiB at most
                raw.append(os.pread(file.fileno(), missing, place))
                if not raw[-1]:
                    raise _changed(shard)
                place, missing = place + len(raw[-1]), missing - len(raw[-1])
        return np.frombuffer(b"".join(raw), dtype=dtype).astype(self.dtype, copy=False)

    @contextmanager
    def _reading(self, number: int) -> Iterator[FileIO]:
        """A file, which is looked at once it was read."""
        shard = self.shards[number]
        try:
            file = self._file(number)
            yield file
            status = os.fstat(file.fileno())
        except FileNotFoundError:
            raise _changed(shard) from None
        except OSError as error:
            raise DataError(f"{shard.path!r} cannot be read: {error.strerror}.") from error
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.changed):
            raise _changed(shard)

    def _file(self, number: int) -> FileIO:
        """Closed when nobody reads it any more: other threads may be reading."""
        file = self._files.get(number)
        if file is None:
            while len(self._files) >= OPEN:
                self._files.pop(next(iter(self._files)), None)
            file = self._files[number] = FileIO(self.shards[number].path)
        return file


def _changed(shard: Shard) -> DataError:
    way_out = (
        "It is made again by a new start" if shard.kind == CACHED else "Restore it, or start anew with it"
    )
    happened = "has changed" if os.path.lexists(shard.path) else "is gone: it was deleted or moved"
    return DataError(f"{shard.path!r} {happened} since it was first read. {way_out}")


class ShardTokens:
    """Ids (L,) of documents that lie in shards, one behind the other, as in `TokenStore.tokens`; in memory is only what
    is asked for.

    begins (n,) int64: where each begins in the shards together; offsets (n + 1,) int64: where in L.
    """

    def __init__(self, files: ShardFiles, begins: np.ndarray, offsets: np.ndarray, nbytes: int = 0):
        self.files, self.begins, self.offsets = files, begins, offsets
        self.dtype = files.dtype
        self.nbytes = nbytes  # of the cache

    @classmethod
    def cached(cls, path: Path, offsets: np.ndarray) -> ShardTokens:
        """Of an array in the cache, where documents lie behind one another. OSError or ValueError where it is none.

        What is known of the file is that of the one that was opened: another process that had nothing in the cache
        either may put its own, of the same bytes and another time, in its place at any moment."""
        file = FileIO(path)
        dtype, shape, start = array_header(file)
        status = os.fstat(file.fileno())
        if len(shape) != 1 or status.st_size != start + shape[0] * dtype.itemsize:
            raise ValueError(f"{path} is no array of ids")
        shard = Shard(str(path), CACHED, dtype.str, start, shape[0], status.st_size, status.st_mtime_ns)
        files = ShardFiles([shard], dtype)
        files._files[0] = file  # open from now on: the cache may be deleted meanwhile
        return cls(files, offsets[:-1], offsets, shape[0] * dtype.itemsize)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Of a slice without a step, or of places (any shape)."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1
            return self._stretch(start, max(start, stop))
        places = np.asarray(index).reshape(-1)
        found = np.empty(len(places), dtype=self.dtype)
        if len(places) and not 0 <= places.min() <= places.max() < len(self):
            raise IndexError(f"{places.min()} to {places.max()} of {len(self)}")
        document = np.searchsorted(self.offsets, places, side="right") - 1
        there = self.begins[document] + places - self.offsets[document]
        cuts = np.flatnonzero(np.diff(there) != 1) + 1
        for first, behind in zip([0, *cuts], [*cuts, len(there)], strict=True):
            if first < behind:
                found[first:behind] = self.files.read(int(there[first]), int(there[first]) + behind - first)
        return found.reshape(np.shape(index))

    def read_into(
        self, ids: np.ndarray, there: np.ndarray, document: np.ndarray, within: np.ndarray, counts: np.ndarray
    ) -> None:
        """As `ShardFiles.read_into`, of stretches that begin `within` a document each (K,) int64."""
        self.files.read_into(ids, there, self.begins[document] + within, counts)

    def _stretch(self, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return np.zeros(0, dtype=self.dtype)
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        behind = int(np.searchsorted(self.offsets, stop, side="left"))
        bounds = np.clip(self.offsets[first : behind + 1], start, stop)
        begins = self.begins[first:behind] + bounds[:-1] - self.offsets[first:behind]
        counts = np.diff(bounds)
        gaps = begins[1:] - (begins + counts)[:-1]
        cuts = np.flatnonzero((gaps < 0) | (gaps > NEAR)) + 1
        pieces = []
        for low, high in zip([0, *cuts], [*cuts, len(begins)], strict=True):
            ids = self.files.read(int(begins[low]), int(begins[high - 1] + counts[high - 1]))
            if gaps[low : high - 1].any():
                _, place = each(begins[low:high], counts[low:high])
                ids = ids[place - begins[low]]
            pieces.append(ids)
        return np.concatenate(pieces)


def each(begins: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For stretches (K,) of so many: which one, and begin, begin + 1, ... of each, one stretch behind the other."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) + np.repeat(begins - (np.cumsum(counts) - counts), counts)


def blocks(files: ShardFiles, number: int) -> Iterator[tuple[int, np.ndarray]]:
    """The ids of one shard, a block at a time, each with the place of its first."""
    base, end = int(files.bases[number]), int(files.bases[number + 1])
    for start in range(base, end, BLOCK):
        yield start - base, files.read(start, min(start + BLOCK, end))


def stamps(shard: Shard) -> list[Stamp]:
    """Of the file, and of its index."""
    path = Path(shard.path)
    files = [path, index_of(path)] if shard.kind == MEGATRON else [path]
    return [stamp for file in files for stamp in FilePart(file.name, file).stamps()]
