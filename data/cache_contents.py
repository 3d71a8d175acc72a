"""What lies in the cache, by kind, and deleting it. Everything there can be made anew, from the text or by the network.

An entry is known by the folder that it lies in and by how such entries are called: what anybody else has put there is
not touched. Of an entry that is a link the link is deleted, not what it leads to. The folder of a kind may be one, to
a larger disk: what lies there is its entries.

What is being written stays, and tokens that a process reads (`data/held.py`).
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import filelock

from data.errors import DataError
from data.held import alone
from naming import not_one_of

__all__ = ["KINDS", "Entry", "Kind", "chosen_kinds", "contents", "delete"]

READ = "a process is reading it"
BUSY = 600.0  # seconds: what was written to since may be being written


class Kind(NamedTuple):
    """`named`: how its entries are called."""

    about: str
    named: re.Pattern[str]


KINDS = {
    "texts": Kind(
        "text of jsonl, parquet and data sets, where documents of shards lie", re.compile(r"\.?[0-9a-f]{32}")
    ),
    "tokens": Kind("tokens of texts, yardsticks", re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}.*-v\d+")),
    "tokenizers": Kind("tokenizers that were trained, files of those known by name", re.compile(r"[\w.-]+")),
    "near_copies": Kind(
        "what held-out text shares with training text", re.compile(r"[0-9a-f]{16}-v\d+\.json")
    ),
    "checked": Kind("which prepared folders have been checked", re.compile(r"[0-9a-f]{32}")),
    "cpp": Kind("compiled kernels", re.compile(r"[\w.-]+\.so")),
}
_TRAINED = re.compile(
    r"[a-z]+(?:-\d+)?-([0-9a-f]{16})(?:-by-text)?-v\d+\.json"
)  # a tokenizer, of the text with that fingerprint


@dataclass(frozen=True)
class Entry:
    """`changed`: when anything of it was last written to (s). `kept`: why it stays, nothing where it may go."""

    kind: str
    path: Path
    bytes: int
    changed: float
    kept: str


def contents(cache: Path) -> list[Entry]:
    """All entries, kind by kind."""
    used = {name.name[:16] for name in _entries(cache, "tokens")}
    return [_entry(kind, path, used) for kind in KINDS for path in _entries(cache, kind)]


def _entries(cache: Path, kind: str) -> Iterator[Path]:
    folder = cache / kind
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if KINDS[kind].named.fullmatch(path.name))


def _entry(kind: str, path: Path, used: set[str]) -> Entry:
    size, changed = _size_of(path)
    kept = ""
    if kind == "texts" and _is_locked(path):
        kept = "a process is writing it"
    elif kind == "tokenizers":
        trained = _TRAINED.fullmatch(path.name)
        kept = (
            "it came over the network"
            if not trained
            else "tokens of its text are here"
            if trained[1] in used
            else ""
        )
    elif kind == "tokens":
        with alone(path) as free:
            kept = "" if free else READ
    if not kept and kind not in ("texts", "checked") and time.time() - changed < BUSY:
        kept = "it was written to in the last ten minutes"
    return Entry(kind, path, size, changed, kept)


def _size_of(path: Path) -> tuple[int, float]:
    """Bytes of a file, or of all below a folder; when it was last written to."""
    files = [path]
    if path.is_dir() and not path.is_symlink():
        files += [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    total, changed = 0, 0.0
    for file in files:
        with suppress(OSError):  # gone meanwhile
            status = file.lstat()
            total += 0 if file.is_dir() and not file.is_symlink() else status.st_size
            changed = max(changed, status.st_mtime)
    return total, changed


def _is_locked(path: Path) -> bool:
    lock = path.with_name(f"{path.name.lstrip('.')}.lock")
    if not lock.exists():
        return False
    try:
        with filelock.FileLock(lock, timeout=0):
            return False
    except filelock.Timeout:
        return True


def chosen_kinds(words: Sequence[str]) -> list[str]:
    """The kinds that words name; "all" names each. DataError for other words."""
    for word in words:
        if word != "all" and word not in KINDS:
            raise DataError(f"clean: {not_one_of(word, [*KINDS, 'all'])}")
    return [kind for kind in KINDS if kind in words or "all" in words]


def delete(entries: Sequence[Entry]) -> list[Entry]:
    """Those of them that may be. All as they are then: some may have begun to be read. Raises OSError."""
    return [entry if entry.kept else _deleted(entry) for entry in entries]


def _deleted(entry: Entry) -> Entry:
    if not entry.path.is_dir() or entry.path.is_symlink():
        entry.path.unlink(missing_ok=True)
        return entry
    with alone(entry.path) as free:
        if not free:
            return replace(entry, kept=READ)
        shutil.rmtree(entry.path)
    return entry
