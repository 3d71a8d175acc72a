"""Folders that `prepare` has written (`data/prepare.py`): token shards, and beside them what a run would else have to
find out: where documents lie, how many bytes they have, the digests of their texts, the tokenizer, the split.

`shards.json` says what belongs to the folder and the sha256 of every file; `{train,val}_<number>.bin` are shards in the
form of `data/shards.py`, a separator in front of each document; `{train,val}.<array>.npy` have a row for each document
of that side. `{train,val}_<number>.utf8` is the text itself, where it was asked for.

So `data=bin input_file=<folder>` is the very text that was prepared: its fingerprint, split, order, tokens and bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy as np

from data.arrays import map_array
from data.cache import cache_root, file_digest, write_atomic
from data.config import DataConfig
from data.corpus import Corpus, Document
from data.errors import DataError
from data.named import FilesConfig
from data.shard_text import InShards
from data.shards import Shard, ShardFiles, ShardTokens, open_shard
from data.stream import FilePart
from data.tokenizers import Tokenizer, load_tokenizer, text_of
from naming import expand_path

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "PARTIAL",
    "SIDES",
    "TOKENIZER",
    "PreparedText",
    "manifest_digest",
    "open_prepared",
    "prepared_folder",
    "prepared_tokenizer",
    "read_manifest",
    "remember_checked",
]

MANIFEST, PARTIAL, TOKENIZER = "shards.json", "partial.json", "tokenizer.json"
FORMAT_VERSION = 1
SIDES = {"heldout": "val", "train": "train"}  # how files of a side begin
MAPPED = 1 << 20  # bytes from which arrays are mapped
MEND = "Bring the files that prepare wrote, or prepare into a new folder"


class PreparedConfig(FilesConfig, DataConfig, Protocol):
    shards_tokenizer: str | None


class PreparedText(InShards):
    """One side of a prepared folder; what is read of its arrays and shards is what is asked for."""

    def __init__(self, folder: Path, side: str, shards: Sequence[Mapping[str, Any]], tokenizer: Tokenizer):
        start = SIDES[side]
        self._sizes, self._digests, self._offsets, self._every_begin = (
            _array(folder / f"{start}.{name}.npy") for name in ("sizes", "digests", "offsets", "begins")
        )
        lossy = folder / f"{start}.lossy.npy"
        self._lossy = _array(lossy) if lossy.exists() else None
        self._tokenizer = tokenizer
        self.files = ShardFiles(
            [open_shard(folder / shard["file"], tokenizer.dtype) for shard in shards], tokenizer.dtype
        )
        self._text: ShardFiles | None = None
        self._text_begins: np.ndarray | None = None
        if all("text" in shard for shard in shards):
            self._text = ShardFiles([_text_file(folder / shard["text"]) for shard in shards], np.uint8)
            self._text_begins = np.cumsum(self._sizes) - self._sizes

    def sizes_of(self, documents: np.ndarray) -> np.ndarray:
        return self._sizes[self._of_all(documents)]

    def begins_of(self, documents: np.ndarray) -> np.ndarray:
        return self._every_begin[self._of_all(documents)]

    def lengths_of(self, documents: np.ndarray) -> np.ndarray:
        every = self._of_all(documents)
        return self._offsets[every + 1] - self._offsets[every]

    def _document(self, document: int) -> Document:
        return Document(self._name(document), self._read(document))

    def _read(self, document: int) -> bytes:
        """The text of one of all documents."""
        if self._text is not None and self._text_begins is not None:
            begin = int(self._text_begins[document])
            return self._text.read(begin, begin + int(self._sizes[document])).tobytes()
        begin, length = (
            int(self._every_begin[document]),
            int(self._offsets[document + 1] - self._offsets[document]),
        )
        return text_of(self._tokenizer, self.files.read(begin, begin + length))

    def _name(self, document: int) -> str:
        begin = int(self._every_begin[document])
        number = int(np.searchsorted(self.files.bases, begin, side="right")) - 1
        return f"{Path(self.files.shards[number].path).name}:{begin - int(self.files.bases[number])}"

    @property
    def lossy(self) -> np.ndarray | None:
        lossy = self._lossy
        return lossy if lossy is None or self._chosen is None else lossy[self._chosen]

    @property
    def raw(self) -> ShardTokens | None:
        lossy = self.lossy
        if lossy is None or not lossy.any():
            return None
        assert self._text is not None and self._text_begins is not None
        ends = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])
        return ShardTokens(self._text, self._text_begins[self._of_all(np.arange(len(self)))], ends)


def _array(path: Path) -> np.ndarray:
    """Mapped, but for a small one, which is better in memory."""
    array = map_array(path)
    return array if array.nbytes > MAPPED else np.array(array)


def _text_file(path: Path) -> Shard:
    ((name, size, changed),) = FilePart(path.name, path).stamps()
    return Shard(name, "text", "|u1", 0, size, size, changed)


# -- opening -------------------------------------------------------------------------------------------------------


def prepared_folder(cfg: FilesConfig) -> Path | None:
    """The prepared folder that `train_files` or `input_file` names, if it is one.

    Raises:
        DataError: `prepare` has not come to its end there, or `val_files` would split it otherwise.
    """
    given = cfg.train_files or cfg.input_file
    if isinstance(given, list):
        given = given[0] if len(given) == 1 else None
    if not given:
        return None
    folder = expand_path(cfg.data_root or "") / expand_path(given)
    if (folder / PARTIAL).is_file() and not (folder / MANIFEST).is_file():
        raise DataError(
            f"{str(folder)!r} is not complete: prepare was stopped there. The same command as before goes on with it"
        )
    if not (folder / MANIFEST).is_file():
        return None
    if cfg.val_files is not None:
        raise DataError(
            f"val_files: {str(folder)!r} was written by prepare, which says what is held out. Leave val_files out, or "
            f"name shards: train_files='{folder}/train_*.bin' val_files='{folder}/val_*.bin'"
        )
    return folder


def prepared_tokenizer(cfg: FilesConfig) -> str | None:
    """The tokenizer file of the prepared folder that a run names, if it names one."""
    folder = prepared_folder(cfg)
    return None if folder is None else str(folder / TOKENIZER)


def open_prepared(folder: Path, cfg: PreparedConfig) -> Corpus:
    """The text of a prepared folder.

    Raises:
        DataError: a file is missing or is another than was written, or `shards_tokenizer` names another tokenizer.
    """
    manifest = read_manifest(folder)
    require_unchanged(folder, manifest)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if tokenizer.digest != manifest["tokenizer"]["digest"]:
        raise DataError(
            _other("tokenizer", folder / TOKENIZER, manifest["tokenizer"]["digest"], tokenizer.digest)
        )
    if cfg.shards_tokenizer:
        from data.tokenizer_choice import tokenizer_of

        said = tokenizer_of(cfg.shards_tokenizer, cache_root())
        if said.digest != tokenizer.digest:
            raise DataError(
                f"shards_tokenizer: {cfg.shards_tokenizer!r} has digest {said.digest[:16]}, and {str(folder)!r} was "
                f"prepared with {tokenizer.name}, {tokenizer.digest[:16]}. Leave it out"
            )
    train, heldout = (
        PreparedText(folder, side, manifest[side]["shards"], tokenizer) for side in ("train", "heldout")
    )
    notes = (
        f"prepared shards of {tokenizer.name} (header {manifest['header']}) in {folder}",
        *manifest["notes"],
    )
    return Corpus(
        manifest["name"], train, heldout, manifest["fingerprint"], notes, known_content=manifest["content"]
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `prepare` has written down of a folder. DataError where it is not as it was written."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version, digest = manifest["format_version"], manifest["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}. {MEND}") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{str(path)!r}: format_version {version!r} is not known; this is {FORMAT_VERSION}")
    if (found := manifest_digest(manifest)) != digest:
        raise DataError(_other("manifest", path, digest, found))
    return manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of what a manifest says beside its digest, in hex."""
    said = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()


def _other(what: str, path: Path, then: str, now: str) -> str:
    return (
        f"{what} {str(path)!r} is another than prepare wrote: its digest is {now[:16]}, and {then[:16]} was written. "
        f"{MEND}"
    )


def require_unchanged(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Sizes each time; bytes once, as long as sizes and times of change stay."""
    for name, file in manifest["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{str(path)!r} of a prepared folder is not there: {error.strerror}. {MEND}"
            ) from error
        if size != file["bytes"]:
            raise DataError(f"{str(path)!r} has {size:,} bytes, and prepare wrote {file['bytes']:,}. {MEND}")
    record = _record(folder, manifest)
    if record.exists():
        return
    with _alone(record):  # several processes of a run: the first one reads all of it
        if record.exists():
            return
        for name, file in manifest["files"].items():
            if (found := file_digest(folder / name)) != file["sha256"]:
                raise DataError(_other("file", folder / name, file["sha256"], found))
        remember_checked(folder, manifest)


def _alone(record: Path) -> AbstractContextManager[object]:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(f"{record}.lock").acquire()
    except OSError:  # where nothing can be kept each of them reads it
        return nullcontext()


def remember_checked(folder: Path, manifest: Mapping[str, Any]) -> None:
    """The files are those that the manifest says: they are not read again for that as long as they stay so."""
    with suppress(OSError):  # where nothing can be kept they are read each time
        write_atomic(_record(folder, manifest), lambda file: file.write(f"{folder.absolute()}\n".encode()))


def _record(folder: Path, manifest: Mapping[str, Any]) -> Path:
    stamps = [FilePart(name, folder / name).stamps() for name in sorted(manifest["files"])]
    told = json.dumps([manifest["digest"], stamps])
    key = hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()
    return cache_root() / "checked" / key[:32]
