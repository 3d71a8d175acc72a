"""Which files a run names: `train_files` or `input_file`, and `val_files`, for sources whose text lies in files of one
kind. Patterns (`*`, `?`, `[ab]`, `**`) match files in sorted order; a folder means the files of the kind below it.
Shards go on with one another, and are sorted by their numbers: `t_9.bin` before `t_10.bin`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data import SOURCES
from data.errors import DataError
from data.files import existing_path, find_files, looks_held_out, shown
from data.stream import Part, Stream
from naming import expand_path, shorten

__all__ = ["KINDS", "FilesConfig", "Kind", "Named", "absolute", "named_files"]


class FilesConfig(Protocol):
    train_files: str | list[str] | None
    val_files: str | list[str] | None
    input_file: str | None
    data_root: str | None  # prefix for relative ones


@dataclass(frozen=True)
class Kind:
    """A kind of file: `source` reads it, in a folder it is known by how its names end. `numbered`: numbers in names say
    which file goes on with which."""

    source: str
    suffixes: tuple[str, ...]
    numbered: bool = False

    def in_order(self, paths: Iterable[Path]) -> list[Path]:
        """By name; of shards by the numbers in them as numbers, however many digits these have."""
        ordered = sorted(paths, key=str)
        return sorted(ordered, key=by_number) if self.numbered else ordered


def by_number(path: Path) -> list[str | int]:
    """A key to sort by: text and numbers by turns."""
    parts = re.split(r"([0-9]+)", str(path))
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


KINDS = {
    name: Kind(name, source.suffixes, name == "bin") for name, source in SOURCES.items() if source.suffixes
}


@dataclass(frozen=True)
class Named:
    """(name, path) of each file; a name is its path below the folder that holds all. `heldout` None: none are named."""

    train: list[tuple[str, Path]]
    heldout: list[tuple[str, Path]] | None
    name: str
    notes: tuple[str, ...]
    kind: Kind
    by_hash: bool

    def stream(
        self, part: Callable[[str, Path], Part], text_field: str | Sequence[str], chats: bool = False
    ) -> Stream:
        """Their text, each read by what `part` makes of a name and a path."""
        train, heldout = (
            None if side is None else [part(*file) for file in side] for side in (self.train, self.heldout)
        )
        read_as = {"source": self.kind.source, "text_field": text_field}
        return Stream(self.name, train or [], heldout, read_as, self.by_hash, self.notes, chats=chats)


def named_files(cfg: FilesConfig, kind: Kind) -> Named:
    """The files that a run names, each once; a held-out one is none to train on.

    Raises:
        DataError: nothing is named or there, files of another kind are, or some are called as held-out text usually is
            and nothing says whether they are it.
    """
    notes: list[str] = []
    training = _training(cfg, kind)
    train = _matched(training, _field(cfg), kind, notes)
    heldout = _matched(_validation(cfg), "val_files", kind, notes) if cfg.val_files else []
    held = {path.resolve() for path in heldout}
    train = [path for path in train if path.resolve() not in held]
    if not train:
        raise DataError(f"val_files: they are all of {_field(cfg)}: there is no text left to train on")
    base = Path(os.path.commonpath([path.absolute().parent for path in [*train, *heldout]]))
    named = [
        [(path.absolute().relative_to(base).as_posix(), path) for path in side] for side in (train, heldout)
    ]
    if cfg.val_files is None:
        _require_no_held_out([name for name, _ in named[0]])
    name = Path(training[0]).name if len(training) == 1 and not glob.has_magic(training[0]) else base.name
    return Named(
        train=named[0],
        heldout=named[1] if cfg.val_files else None,
        name=name or str(base),
        notes=tuple(dict.fromkeys(notes)),
        kind=kind,
        by_hash=cfg.val_files is not None,
    )


def absolute(cfg: FilesConfig, kind: Kind) -> dict[str, list[str]]:
    """The fields with patterns that mean the same from any folder. DataError as `named_files`."""
    named_files(cfg, kind)
    changes = {}
    if cfg.train_files:
        changes["train_files"] = [os.path.abspath(pattern) for pattern in _patterns(cfg, cfg.train_files)]
    if cfg.val_files:
        changes["val_files"] = [os.path.abspath(pattern) for pattern in _validation(cfg)]
    return changes


# -- patterns ------------------------------------------------------------------------------------------------------


def _field(cfg: FilesConfig) -> str:
    return "train_files" if cfg.train_files else "input_file"


def _training(cfg: FilesConfig, kind: Kind) -> list[str]:
    if cfg.train_files and cfg.input_file:
        raise DataError("train_files and input_file both name what is trained on. Leave one of them out")
    if not cfg.train_files and not cfg.input_file:
        raise DataError(f"data={kind.source} needs train_files=<files> or input_file=<file or folder>")
    return _patterns(cfg, cfg.train_files or cfg.input_file or "")


def _validation(cfg: FilesConfig) -> list[str]:
    """In the folder of `input_file` where they are there, else where all files are looked for."""
    far = _patterns(cfg, cfg.val_files or [])
    if not cfg.input_file:
        return far
    path = Path(_patterns(cfg, cfg.input_file)[0])
    home = path if path.is_dir() else path.parent
    names = [cfg.val_files] if isinstance(cfg.val_files, str) else cfg.val_files or []
    near = [str(home / expand_path(name)) for name in names]
    return [
        n if os.path.lexists(n) or glob.glob(n, recursive=True) else f for n, f in zip(near, far, strict=True)
    ]


def _patterns(cfg: FilesConfig, names: str | Sequence[str]) -> list[str]:
    root = expand_path(cfg.data_root or "")
    return [str(root / expand_path(name)) for name in ([names] if isinstance(names, str) else names)]


def _matched(patterns: Sequence[str], field: str, kind: Kind, notes: list[str]) -> list[Path]:
    """Regular files, each once, patterns in their order."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if glob.has_magic(pattern) and not os.path.lexists(pattern):
            paths = kind.in_order(map(Path, glob.glob(pattern, recursive=True)))
            files = [path for path in paths if path.is_file()]
            if not files:
                raise DataError(f"{field}: {pattern!r} matches no file (looked from {os.getcwd()})")
        else:
            existing_path(field, path)
            files = _in_folder(path, kind, notes) if path.is_dir() else [path]
        found += files
    for path in found:
        _require_kind(path, field, kind)
    first: dict[Path, Path] = {}
    for path in found:
        first.setdefault(path.resolve(), path)
    return list(first.values())


def _in_folder(folder: Path, kind: Kind, notes: list[str]) -> list[Path]:
    names, about = find_files(folder, kind.suffixes, kind.source)
    others = {
        other.source: find_files(folder, other.suffixes, other.source)[0]
        for other in KINDS.values()
        if other != kind
    }
    if mixed := {source: files for source, files in others.items() if files}:
        counts = " and ".join(f"{len(files):,} of {source}" for source, files in mixed.items())
        raise DataError(
            f"{str(folder)!r} holds {len(names):,} files of {kind.source} and {counts}: it is not plain which are "
            f"meant. Name them: train_files='{folder}/*{kind.suffixes[0]}'"
        )
    if not names:
        said = f" ({'; '.join(about)})" if about else ""
        raise DataError(
            f"{str(folder)!r} has no file of {kind.source}{said}. They are those ending in {' '.join(kind.suffixes)}."
        )
    notes += about
    return kind.in_order(folder / name for name in names)


def _require_kind(path: Path, field: str, kind: Kind) -> None:
    for other in KINDS.values():
        if other != kind and path.name.lower().endswith(other.suffixes):
            raise DataError(f"{field}: {str(path)!r} is a file of {other.source}. Set data={other.source}")


def _require_no_held_out(names: list[str]) -> None:
    held = [name for name in names if looks_held_out(name)]
    if held and len(held) < len(names):
        raise DataError(
            f"{shown(shorten(held, 3))}: called as held-out text usually is, and would be trained on. Name what is "
            f"held out: val_files={shown(held[0])} (or a list; val_files=[] holds out documents of all by hash)"
        )
