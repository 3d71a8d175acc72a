"""What the command `prepare` does with a text: it writes a folder of token shards (`data/prepared.py` reads it back).

The documents are those of the source, in its order, on the sides of its split: they are read as a run would read them,
so a stream lies in the cache first (`data/kept.py`). Shards hold whole documents, as many as fit into `shard_tokens`, a
separator in front of each. What is written depends on the text, the tokenizer and that number alone, never on how many
processes encode.

A shard is written aside and renamed; then a record of it, with its sha256, is written into `.parts`. A preparation that
was killed goes on behind the last shard that has a record and is as the record says, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np

from data import SOURCES, load_corpus, unheard
from data.arrays import map_array
from data.cache import file_digest, write_atomic
from data.config import CHATS, DataConfig
from data.corpus import Corpus, Document, Texts, fingerprint, selected, sizes, total_bytes
from data.encoder import Encoded, Encoders
from data.errors import DataError
from data.near_copies import Overlap
from data.prepared import (
    FORMAT_VERSION,
    MANIFEST,
    PARTIAL,
    SIDES,
    TOKENIZER,
    manifest_digest,
    read_manifest,
    remember_checked,
    require_unchanged,
)
from data.shards import GPT2_HEADER, HEADER, LLAMA_HEADER, header_of
from data.tokenizer_choice import make_tokenizer
from data.tokenizers import Tokenizer, load_tokenizer

__all__ = ["LARGEST_SHARD", "SMALLEST_SHARD", "Prepared", "Wanted", "prepare"]

PARTS, LOCK = ".parts", ".lock"
LARGEST_SHARD = (1 << 31) - 1  # tokens: the header counts them in an int32
SMALLEST_SHARD = 1_000
# Names that a preparation writes: nothing else in its folder is deleted or listed.
_SIDE = f"(?:{'|'.join(SIDES.values())})"
_SHARD = re.compile(rf"\.?({_SIDE})_(\d{{6,}})\.(?:bin|utf8)")  # with a dot while it is being written
_PART = re.compile(rf"({_SIDE})_(\d{{6,}})\.(?:lengths\.npy|lossy\.npy|json)")
# Files that were being written by `write_atomic` when a preparation was killed.
_ABANDONED = re.compile(
    rf"\.(?:(?:shards|partial|tokenizer)\.json|{_SIDE}\.(?:offsets|begins|sizes|digests|lossy)\.npy)\.\w{{8}}"
)
_ABANDONED_PART = re.compile(rf"\.{_PART.pattern}\.\w{{8}}")
Progress = Callable[[int, int], object]  # bytes of text that are done, and of all


@dataclass(frozen=True)
class Wanted:
    """How a text is prepared. `text`: it is written beside its tokens. `shard_tokens`: separators are among them."""

    folder: Path
    processes: int = 1
    text: bool = False
    drop_copies: bool = False
    shard_tokens: int = 100_000_000


@dataclass(frozen=True)
class Prepared:
    """`kept`: documents that were there already, of a preparation that was stopped; of a complete one all are."""

    manifest: Mapping[str, Any]
    kept: int
    notes: tuple[str, ...]


def prepare(
    cfg: DataConfig,
    wanted: Wanted,
    cache: Path,
    tell: Callable[[str], object] = unheard,
    progress: Progress = lambda done, total: None,
) -> Prepared:
    """Write the folder, or what it still lacks.

    Raises:
        DataError: the text or the tokenizer cannot be used as asked; the folder holds something else; a document
            cannot be encoded, or is not given back and the text is not kept; there is no room. What is complete stays.
    """
    if cfg.training_mode == CHATS:
        raise DataError(
            "training_mode: chats are read from their rows at every start, as shards hold no turns. Leave it at "
            "pretraining to prepare text"
        )
    _require_place(wanted.folder)
    corpus, tokenizer, overlap, notes = _read(cfg, wanted, cache, tell)
    asked = {
        "format_version": FORMAT_VERSION,
        "name": corpus.name,
        "fingerprint": corpus.fingerprint,
        "content": corpus.content,
        "tokenizer": {"name": tokenizer.name, "digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
        "header": GPT2_HEADER if tokenizer.dtype.itemsize == 2 else LLAMA_HEADER,
        "separator": tokenizer.eot,
        "text": wanted.text,
        "shard_tokens": wanted.shard_tokens,
    }
    folder = wanted.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / LOCK, timeout=0):
            _begin(folder, asked, tokenizer)
            if (folder / MANIFEST).exists():
                manifest = read_manifest(folder)
                require_unchanged(folder, manifest)
                _tidy(folder)
                documents = sum(manifest[side]["documents"] for side in SIDES)
                return Prepared(manifest, documents, tuple(notes))
            tell("")  # `progress` does
            with Encoders(folder / TOKENIZER, wanted.processes) as encoders:
                kept, shards = _write(corpus, asked, wanted, encoders, tell, progress)
            tell("writing where the documents lie")
            manifest = _finish(folder, asked, corpus, shards, overlap)
    except filelock.Timeout:
        raise DataError(
            f"another prepare is writing to {str(folder)!r}. Wait for it, or name another folder"
        ) from None
    except OSError as error:
        raise DataError(
            f"{str(folder)!r} cannot be written: {error.strerror or error}. What is complete is kept there: once that "
            f"is mended, the same command goes on with it"
        ) from error
    return Prepared(manifest, kept, tuple(notes))


# -- what is to be written -----------------------------------------------------------------------------------------


def _read(
    cfg: DataConfig, wanted: Wanted, cache: Path, tell: Callable[[str], object]
) -> tuple[Corpus, Tokenizer, Overlap | None, list[str]]:
    source = SOURCES[cfg.data]
    if source.near_copies is None:
        raise DataError(f"data={cfg.data} is generated anew by every run: there is nothing to prepare")
    # Where nobody asks and they stay anyway, the run counts them.
    measure = cfg.near_copies is not None or source.near_copies == "drop"
    corpus, overlap = load_corpus(cfg, cache, tell, measure=measure)
    if corpus.mixture is not None:
        raise DataError(
            f"data={cfg.data}: prepare its sources one by one, and mix the folders (data: bin, input_file)"
        )
    notes = list(corpus.notes)
    # What is said of this machine's cache is nothing to keep.
    about = [note for note in notes if str(cache) not in note]
    if wanted.drop_copies:
        tell("looking for copies")
        corpus, note = _without_copies(corpus)
        notes.append(note)
        about.append(note)
    tell(f"making the tokenizer ({cfg.tokenizer})")
    tokenizer = make_tokenizer(cfg, "token", corpus, cache, notes)
    return replace(corpus, notes=tuple(about)), tokenizer, overlap, notes


def _without_copies(corpus: Corpus) -> tuple[Corpus, str]:
    """Each text once: the first, held-out ones before those for training."""
    digests = {side: _digests(_documents(corpus, side)) for side in SIDES}
    first = _first_of_each([digests[side] for side in SIDES])
    held = len(digests["heldout"])
    heldout = selected(corpus.heldout, first[first < held])
    train = selected(corpus.train, first[first >= held] - held)
    dropped = {"heldout": held - len(heldout), "train": len(digests["train"]) - len(train)}
    note = (
        f"dropped exact copies: {dropped['train']:,} documents for training, {dropped['heldout']:,} held out"
    )
    if not any(dropped.values()):
        return corpus, note
    if not len(train):
        raise DataError(
            "drop_copies would leave nothing to train on: all of it is held out too. Hold out other text"
        )
    told = fingerprint(train, heldout)
    return replace(corpus, train=train, heldout=heldout, fingerprint=told, known_content=None), note


def _first_of_each(digests: Sequence[np.ndarray]) -> np.ndarray:
    """Places (k,), rising, of the first row of each value of digests (n, 32), given in parts; 128 bits tell them apart.

    Sorted by 64 of them, all 128 are looked at where these are equal: ten million documents are a matter of memory.
    """
    words = np.concatenate([np.ascontiguousarray(part[:, :8]).view("<u8")[:, 0] for part in digests])  # (n,)
    order = np.argsort(words, kind="stable")
    words = words[order]
    again = np.zeros(len(order) + 1, dtype=bool)
    again[1:-1] = words[1:] == words[:-1]
    shared = again[1:] | again[:-1]  # equal to the one before or behind
    places = np.sort(order[shared])
    ends = np.cumsum([0, *map(len, digests)])
    parts = [
        part[places[(places >= start) & (places < end)] - start, :16]
        for part, (start, end) in zip(digests, pairwise(ends), strict=True)
    ]
    _, first = np.unique(np.concatenate(parts), axis=0, return_index=True)
    return np.sort(np.concatenate([order[~shared], places[first]]))


def _documents(corpus: Corpus, side: str) -> Sequence[Document]:
    return corpus.train if side == "train" else corpus.heldout


def _digests(documents: Sequence[Document]) -> np.ndarray:
    """sha256 of each text (n, 32) uint8."""
    if isinstance(documents, Texts):
        return documents.digests
    joined = b"".join(hashlib.sha256(document.text).digest() for document in documents)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 32)


# -- the folder ----------------------------------------------------------------------------------------------------


def _require_place(folder: Path) -> None:
    """DataError where the folder, or one that it is to lie in, is something else."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise DataError(f"{str(there)!r} is there and is no folder. Name a new folder: --out <folder>")


def _begin(folder: Path, asked: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """A folder is new, or holds (a part of) just this. DataError where it holds something else."""
    there = next((name for name in (MANIFEST, PARTIAL) if (folder / name).exists()), None)
    others = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if there is None and others:
        raise DataError(
            f"{str(folder)!r} holds other files ({others[0]!r}). Name a new folder: --out <folder>"
        )
    for path in folder.iterdir():
        if _ABANDONED.fullmatch(path.name):
            path.unlink()
    if there is None:
        content = json.dumps(asked, indent=1)
        write_atomic(folder / PARTIAL, lambda file: file.write(content.encode("utf-8", "backslashreplace")))
        tokenizer.save(folder / TOKENIZER)
        return
    then = read_manifest(folder) if there == MANIFEST else _read_json(folder / PARTIAL)
    _require_same(folder, then, asked)
    if there == PARTIAL and not (folder / TOKENIZER).exists():  # stopped just before it
        tokenizer.save(folder / TOKENIZER)
    if (found := load_tokenizer(folder / TOKENIZER).digest) != tokenizer.digest:
        raise DataError(
            f"{str(folder / TOKENIZER)!r} has digest {found[:16]}, and the shards beside it are of {tokenizer.name}, "
            f"{tokenizer.digest[:16]}. Put that one back, or name a new folder"
        )


def _require_same(folder: Path, then: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if then.get("tokenizer") != asked["tokenizer"]:
        told = " and ".join(
            f"{t['name']} ({t['digest'][:16]})" for t in (then["tokenizer"], asked["tokenizer"])
        )
        raise DataError(
            f"{str(folder)!r} is of another tokenizer, and one folder holds shards of one: {told}. Name a new folder"
        )
    if then.get("fingerprint") != asked["fingerprint"]:
        raise DataError(
            f"{str(folder)!r} holds other text (fingerprint {str(then.get('fingerprint'))[:16]}; asked for is "
            f"{asked['fingerprint'][:16]}): files, split, near_copies or drop_copies were others. Name a new folder"
        )
    if differing := [name for name in ("text", "shard_tokens") if then.get(name) != asked[name]]:
        name = differing[0]
        raise DataError(
            f"{str(folder)!r} was begun with {name} {then.get(name)}, and {asked[name]} is asked for. Name a new folder"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return content
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(path)!r} cannot be read: {error}. Delete its folder, or name a new one"
        ) from error


def _write(
    corpus: Corpus,
    asked: Mapping[str, Any],
    wanted: Wanted,
    encoders: Encoders,
    tell: Callable[[str], object],
    progress: Progress,
) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """The shards; how many documents were there already, and records by side."""
    folder = wanted.folder
    (folder / PARTS).mkdir(exist_ok=True)
    total = sum(total_bytes(_documents(corpus, side)) for side in SIDES)
    done = kept = 0
    shards: dict[str, list[dict[str, Any]]] = {}
    for side in SIDES:
        shards[side] = _complete(folder, SIDES[side])
        there = sum(shard["documents"] for shard in shards[side])
        kept += there
        done += sum(shard["bytes"] for shard in shards[side])
        progress(done, total)
        documents = _documents(corpus, side)
        rest = documents[there:] if there else documents
        if len(rest):
            writing = _Writing(folder, SIDES[side], asked, wanted, len(shards[side]))
            for shard in writing.shards(encoders.encoded(rest), progress, done, total):
                shards[side].append(shard)
                done += shard["bytes"]
    return kept, shards


def _complete(folder: Path, start: str) -> list[dict[str, Any]]:
    """Records of the shards that are there and as they were written; what is behind them is deleted."""
    found: list[dict[str, Any]] = []
    while (path := folder / PARTS / f"{start}_{len(found):06}.json").exists():
        try:
            record = json.loads(path.read_bytes())
            if any(file_digest(folder / name) != digest for name, digest in record["sha256"].items()):
                break
        except (OSError, ValueError, KeyError):
            break
        found.append(record)
    names = {name for record in found for name in record["sha256"]}
    for where, known in ((folder, _SHARD), (folder / PARTS, _PART)):
        for path in list(where.iterdir()):
            named = known.fullmatch(path.name)
            if named is None or named[1] != start or path.relative_to(folder).as_posix() in names:
                continue
            if path.suffix != ".json" or int(named[2]) >= len(found):
                path.unlink()
    return found


class _Writing:
    """The shards of one side, from one number on."""

    def __init__(self, folder: Path, start: str, asked: Mapping[str, Any], wanted: Wanted, number: int):
        self.folder, self.start, self.number = folder, start, number
        self.asked, self.wanted = asked, wanted
        self.dtype = np.dtype("<u2" if asked["header"] == GPT2_HEADER else "<u4")

    def shards(
        self, documents: Iterator[Encoded], progress: Progress, done: int, total: int
    ) -> Iterator[dict[str, Any]]:
        """A record of each as it is complete."""
        following = next(documents, None)
        while following is not None:
            with _Shard(self.folder, self._name, self.asked["text"]) as shard:
                while following is not None and shard.has_room(following, self.wanted.shard_tokens):
                    self._require_given_back(following)
                    shard.add(following, self.dtype, self.asked["separator"])
                    progress(done + shard.bytes, total)
                    following = next(documents, None)
                record = shard.complete(self.asked["header"])
            self.number += 1
            done += record["bytes"]
            yield record

    @property
    def _name(self) -> str:
        return f"{self.start}_{self.number:06}"

    def _require_given_back(self, encoded: Encoded) -> None:
        if encoded.lossy and not self.asked["text"]:
            raise DataError(
                f"{encoded.document.name}: the ids of tokenizer {self.asked['tokenizer']['name']} do not give its text "
                f"back, and its bytes would be lost. Keep the text beside them: --text; or name another tokenizer"
            )
        if len(encoded.ids) >= LARGEST_SHARD:
            raise DataError(
                f"{encoded.document.name} has {len(encoded.ids):,} tokens, and a shard holds {LARGEST_SHARD:,}"
            )


class _Shard:
    """One that is being written: files whose names begin with a dot until they are complete."""

    def __init__(self, folder: Path, name: str, text: bool):
        self.folder, self.name = folder, name
        self.tokens = self.bytes = 0
        self.lengths: list[int] = []
        self.sizes: list[int] = []
        self.lossy: list[bool] = []
        self._open = ExitStack()
        self._begun: list[Path] = []
        self._ids = self._file(f"{name}.bin")
        self._text = self._file(f"{name}.utf8") if text else None
        self._ids.write(bytes(HEADER))

    def _file(self, name: str) -> BinaryIO:
        self._begun.append(self.folder / f".{name}")
        return self._open.enter_context(open(self._begun[-1], "wb"))

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._open.close()
        finally:  # what is not complete makes room
            for path in self._begun:
                path.unlink(missing_ok=True)

    def has_room(self, encoded: Encoded, shard_tokens: int) -> bool:
        return not self.lengths or self.tokens + 1 + len(encoded.ids) <= shard_tokens

    def add(self, encoded: Encoded, dtype: np.dtype, separator: int) -> None:
        self._ids.write(np.array([separator], dtype=dtype).tobytes())
        self._ids.write(encoded.ids.astype(dtype, copy=False).tobytes())
        if self._text is not None:
            self._text.write(encoded.document.text)
        self.tokens += 1 + len(encoded.ids)
        self.bytes += len(encoded.document.text)
        self.lengths.append(len(encoded.ids))
        self.lossy.append(encoded.lossy)

    def complete(self, header: str) -> dict[str, Any]:
        """Its record, which is written last."""
        self._ids.seek(0)
        self._ids.write(header_of(header, self.tokens))
        self._open.close()
        names = [f"{self.name}.bin", *([f"{self.name}.utf8"] if self._text is not None else [])]
        for name in names:
            _to_disk(self.folder / f".{name}")
            os.replace(self.folder / f".{name}", self.folder / name)
        parts = {"lengths": np.array(self.lengths, dtype=np.int64), "lossy": np.array(self.lossy, dtype=bool)}
        for what, array in parts.items():
            names.append(f"{PARTS}/{self.name}.{what}.npy")
            _save(self.folder / names[-1], array)
        record = {
            "file": f"{self.name}.bin",
            **({"text": f"{self.name}.utf8"} if self._text is not None else {}),
            "documents": len(self.lengths),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "sha256": {name: file_digest(self.folder / name) for name in names},
        }
        content = json.dumps(record, indent=1)
        write_atomic(self.folder / PARTS / f"{self.name}.json", lambda file: file.write(content.encode()))
        return record


def _to_disk(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _save(path: Path, array: np.ndarray) -> None:
    write_atomic(path, lambda file: np.save(file, array, allow_pickle=False))


def _write_index(
    folder: Path, start: str, documents: Sequence[Document], shards: Sequence[Mapping[str, Any]]
) -> list[str]:
    """A row for each document of a side; names of the files."""
    parts = {
        what: np.concatenate(
            [map_array(folder / PARTS / f"{Path(shard['file']).stem}.{what}.npy") for shard in shards]
            or [np.zeros(0, dtype=dtype)]
        )
        for what, dtype in (("lengths", np.int64), ("lossy", bool))
    }
    offsets = np.concatenate([[0], np.cumsum(parts["lengths"], dtype=np.int64)])
    assert len(offsets) == len(documents) + 1
    arrays = {
        "offsets": offsets,
        # A separator stands in front of each, and shards lie one behind the other.
        "begins": offsets[:-1] + np.arange(1, len(offsets)),
        "sizes": sizes(documents),
        "digests": _digests(documents),
        **({"lossy": parts["lossy"]} if parts["lossy"].any() else {}),
    }
    for what, array in arrays.items():
        _save(folder / f"{start}.{what}.npy", array)
    return [f"{start}.{what}.npy" for what in arrays]


def _finish(
    folder: Path,
    asked: Mapping[str, Any],
    corpus: Corpus,
    shards: Mapping[str, Sequence[Mapping[str, Any]]],
    overlap: Overlap | None,
) -> dict[str, Any]:
    """The manifest, with which the folder is complete."""
    known = {
        name: digest
        for side in SIDES
        for shard in shards[side]
        for name, digest in shard["sha256"].items()
        if Path(name).parent != Path(PARTS)
    }
    files = [TOKENIZER, *known]
    for side, start in SIDES.items():
        files += _write_index(folder, start, _documents(corpus, side), shards[side])
    manifest: dict[str, Any] = {**asked, "notes": list(corpus.notes)}
    manifest["near_copies"] = overlap.as_dict() if overlap else None
    for side in SIDES:
        manifest[side] = {
            **{what: sum(shard[what] for shard in shards[side]) for what in ("documents", "tokens", "bytes")},
            "shards": [
                {key: value for key, value in shard.items() if key != "sha256"} for shard in shards[side]
            ],
        }
    manifest["files"] = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": known.get(name) or file_digest(folder / name),
        }
        for name in sorted(files)
    }
    manifest["digest"] = manifest_digest(manifest)
    content = json.dumps(manifest, indent=1)
    write_atomic(folder / MANIFEST, lambda file: file.write(content.encode("utf-8", "backslashreplace")))
    remember_checked(folder, manifest)
    _tidy(folder)
    return manifest


def _tidy(folder: Path) -> None:
    """What only a folder that is not complete needs."""
    parts = folder / PARTS
    if parts.is_dir():
        for path in list(parts.iterdir()):
            if _PART.fullmatch(path.name) or _ABANDONED_PART.fullmatch(path.name):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else
            parts.rmdir()
    (folder / PARTIAL).unlink(missing_ok=True)
