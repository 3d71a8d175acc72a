"""`data=text`: the user's own file or folder of UTF-8 text.

A folder: every regular file below it whose suffix is in `TEXT_SUFFIXES` (`data/files.py`); one document a file. One
file in twenty is held out by a hash of its relative path, unless `val_files` names the held-out text.

A single file: its last 10 %, cut at a line end, is held out, or what `val_files` names. It is read as sections of about
64 KiB cut at line ends, a section a document: the order of training is a permutation of documents, and one
document could not be shuffled. So attention does not reach further back than its section's start.

`document_separator`: files are cut into documents at the lines that consist of it.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from data.corpus import (
    Corpus,
    Document,
    drop_duplicates,
    fingerprint,
    is_held_out,
    path_hash,
    total_bytes,
)
from data.cuts import about_separator, documents_of, line_end_near, sections, separated
from data.errors import DataError
from data.files import TEXT_SUFFIXES, existing_path, find_text, looks_held_out, read_text, shown
from naming import expand_path, shorten


class TextConfig(Protocol):
    input_file: str | None
    data_root: str | None  # prefix for a relative input_file
    val_files: str | list[str] | None
    document_separator: str | None


Split = tuple[list[Document], list[Document], list[str]]  # train, held out, notes


def load(cfg: TextConfig) -> Corpus:
    """The corpus of `input_file` (relative to `data_root`, else to the working directory).

    Raises:
        DataError: no path given, nothing there, nothing usable in it, text that is not UTF-8, or no fair split.
    """
    path = input_path(cfg)
    files, notes = _read(path)
    if cfg.val_files:
        train, heldout, more = _split_by_name(path, files, cfg)
    elif len(files) == 1:
        train, heldout, more = _split_by_place(path, files[0], cfg.document_separator)
    else:
        train, heldout, more = _split_by_hash(path, files, cfg)
    if cfg.document_separator:
        train, left = _without(train, heldout, path)
        more += left
    return Corpus(path.name, train, heldout, fingerprint(train, heldout), (*notes, *more))


def read_whole(cfg: TextConfig) -> list[Document]:
    """All of `input_file`, to be scored: a document a file, or as `document_separator` cuts them."""
    path = input_path(cfg)
    files, _ = _read(path)
    return documents_of(files, cfg.document_separator)


def input_path(cfg: TextConfig) -> Path:
    """The file or folder that is meant."""
    if not cfg.input_file:
        raise DataError("data=text needs input_file=<file or folder of UTF-8 text>; none was given.")
    return existing_path("input_file", _below(cfg, cfg.input_file))


def val_paths(cfg: TextConfig) -> list[Path]:
    """The files and folders of `val_files`: in the folder of `input_file`, else where that one is looked for."""
    path = input_path(cfg)
    home = path if path.is_dir() else path.parent
    names = [cfg.val_files] if isinstance(cfg.val_files, str) else cfg.val_files or []
    inside = [home / expand_path(name) for name in names]
    return [
        near if near.exists() else existing_path("val_files", far if far.exists() else near)
        for near, far in zip(inside, (_below(cfg, name) for name in names), strict=True)
    ]


def absolute(cfg: TextConfig) -> dict[str, list[str]]:
    """The fields with paths that mean the same from any folder. DataError where nothing is there."""
    return {"val_files": [str(path.absolute()) for path in val_paths(cfg)]} if cfg.val_files else {}


def _below(cfg: TextConfig, name: str) -> Path:
    return expand_path(cfg.data_root or "") / expand_path(name)


# -- reading -------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[list[Document], list[str]]:
    """The files with text of a file or folder, each once, and notes about what else is there."""
    if not path.is_dir():
        text = read_text(path)
        if not text.strip():
            raise DataError(f"{str(path)!r} is empty: there is no text in it.")
        return [Document(path.name, text)], []
    names, notes = find_text(path)
    documents = [Document(name, read_text(path / name)) for name in names]
    kept = [document for document in documents if document.text.strip()]
    if empty := len(documents) - len(kept):
        notes.append(f"skipped {empty} empty files")
    kept, duplicates = drop_duplicates(kept)
    if duplicates:
        notes.append(f"dropped {duplicates} exact duplicates")
    if not kept:
        found = f" ({'; '.join(notes)})" if notes else ""
        suffixes = " ".join(TEXT_SUFFIXES)
        raise DataError(
            f"{str(path)!r} has no usable text file{found}. Text files are those ending in {suffixes}."
        )
    return kept, notes


# -- splitting -----------------------------------------------------------------------------------------------------


def _split_by_name(path: Path, files: list[Document], cfg: TextConfig) -> Split:
    """Held out is what `val_files` names, wherever it lies; trained on is the rest of `input_file`."""
    named = [file for val in val_paths(cfg) for file in _named_files(val)]
    held = [Document(_relative(file, path), read_text(file)) for file in dict.fromkeys(named)]
    held = [document for document in held if document.text.strip()]
    if not held:
        raise DataError(f"val_files: there is no text in {cfg.val_files!r}. Name a file with text")
    home = path if path.is_dir() else path.parent
    taken, texts = {file.resolve() for file in named}, {document.text for document in held}
    others = [file for file in files if (home / file.name).resolve() not in taken]
    train = [file for file in others if file.text not in texts]
    if not train:
        raise DataError(
            f"val_files: {cfg.val_files!r} is all the text of {str(path)!r}: there is none left to train on. "
            f"Name a part of it, or another file"
        )
    notes = [f"held out: {len(held)} files by val_files, {total_bytes(held):,} bytes"]
    if copies := len(others) - len(train):
        names = [shown(file.name) for file in others if file.text in texts]
        notes.append(
            f"dropped {copies} exact duplicates of held-out files from training: {shorten(names, 3)}"
        )
    notes += about_separator([*train, *held], cfg.document_separator)
    in_sections = len(train) == 1
    return (
        documents_of(train, cfg.document_separator, in_sections=in_sections),
        documents_of(held, cfg.document_separator, in_sections=in_sections),
        notes,
    )


def _without(train: list[Document], heldout: list[Document], path: Path) -> tuple[list[Document], list[str]]:
    """The training documents whose text is no held-out document's, and a note about the others."""
    held = {document.text for document in heldout}
    kept = [document for document in train if document.text not in held]
    copies = [shown(document.name) for document in train if document.text in held]
    if not kept:
        raise DataError(
            f"all documents to train on in {str(path)!r} are held out too. Name other held-out text: val_files=<file>"
        )
    if not copies:
        return train, []
    return kept, [
        f"left out of training, as they are held out: {len(copies):,} documents, {shorten(copies, 3)}"
    ]


def _named_files(path: Path) -> list[Path]:
    return [path / name for name in find_text(path)[0]] if path.is_dir() else [path]


def _relative(file: Path, path: Path) -> str:
    """The name of a held-out file: in the folder of the text its place there, so that it is the same on any machine."""
    file, path = file.absolute(), path.absolute()
    return file.relative_to(path).as_posix() if path.is_dir() and file.is_relative_to(path) else file.name


def _split_by_place(path: Path, file: Document, separator: str | None) -> Split:
    """The last 10 % of one file: of its documents where it has separators, else cut at a line end."""
    file = Document(PurePosixPath(file.name).name, file.text)  # a folder of one file is that file
    notes = about_separator([file], separator)
    if separator:
        train, heldout, more = _lastdocuments_of(separated(file, separator))
        return train, heldout, [*notes, *more]
    name, text = file
    cut = line_end_near(text, len(text) * 9 // 10)
    if cut in (0, len(text)):
        raise DataError(
            f"{str(path)!r} has {len(text)} bytes: too short to hold out its last 10 %. Or name other text: "
            f"val_files=<file>"
        )
    where = "a line end" if text[cut - 1 : cut] == b"\n" else "a character, as no line ends there"
    notes.append(f"held out: the last {len(text) - cut:,} bytes of {shown(name)}, cut at {where}")
    return sections(name, text, 0, cut), sections(name, text, cut, len(text)), notes


def _lastdocuments_of(documents: list[Document]) -> Split:
    documents, duplicates = drop_duplicates(documents)
    if len(documents) < 2:
        raise DataError("document_separator: the text is one document, and two are needed to hold one out.")
    ends = np.cumsum([len(document.text) for document in documents])
    cut = max(1, int(np.searchsorted(ends, ends[-1] * 9 // 10, side="right")))
    train, heldout = documents[:cut], documents[cut:]
    notes = [
        f"held out: the last {len(heldout):,} of {len(documents):,} documents, {total_bytes(heldout):,} bytes"
    ]
    if duplicates:
        notes.append(f"dropped {duplicates:,} exact duplicates")
    return train, heldout, notes


def _split_by_hash(path: Path, files: list[Document], cfg: TextConfig) -> Split:
    """One file in twenty by a hash of its path. Where that is nothing or most of the text the user decides, unless
    `val_files: []` leaves it to the hash: the last tenth of the files in its order where that is nothing or all."""
    held = {file.name for file in files if is_held_out(file.name)}
    how = f"held out: {len(held)} of {len(files)} files by path hash"
    if cfg.val_files is None and not 0 < (share := _share(held, files)) <= 0.5:
        raise DataError(_lopsided(path, files, len(held), share))
    if not 0 < len(held) < len(files):
        held = _last_tenth(files)
        how = f"held out: {len(held)} of {len(files)} files, the last tenth by path hash (small folder)"
    train = [file for file in files if file.name not in held]
    heldout = [file for file in files if file.name in held]
    notes = [how, *about_separator(files, cfg.document_separator)]
    return documents_of(train, cfg.document_separator), documents_of(heldout, cfg.document_separator), notes


def _share(names: Container[str], files: Sequence[Document]) -> float:
    return total_bytes([file for file in files if file.name in names]) / total_bytes(files)


def _last_tenth(files: Sequence[Document]) -> set[str]:
    order = sorted(files, key=lambda file: (path_hash(file.name), file.name))
    return {file.name for file in order[-max(1, len(order) // 10) :]}


def _lopsided(path: Path, files: Sequence[Document], count: int, share: float) -> str:
    largest = sorted(files, key=lambda file: -len(file.text))
    sizes = ", ".join(f"{shown(file.name)} {len(file.text):,}" for file in largest[:5])
    more = f" and {len(files) - 5:,} more" if len(files) > 5 else ""
    example = shlex.quote(f"val_files={_likely(files)}")
    return (
        f"{str(path)!r}: by a hash of their paths {count} of {len(files)} files would be held out, {share:.0%} of "
        f"{total_bytes(files):,} bytes ({sizes}{more}). Name the held-out text: "
        f"{example} (or a list of files and folders; val_files=[] takes the last tenth of the files by hash)"
    )


def _likely(files: Sequence[Document]) -> str:
    """A file or folder at the top that is called as held-out text usually is; else the file nearest to a tenth."""
    total, at_top = total_bytes(files), Counter[str]()
    for name, text in files:
        at_top[PurePosixPath(name).parts[0]] += len(text)
    usual = [name for name, size in at_top.items() if looks_held_out(name) and size <= total / 2]
    return usual[0] if usual else min(files, key=lambda file: abs(len(file.text) - total / 10)).name
