"""`data=text`: the user's own file or folder of UTF-8 text.

A folder: every regular file below it whose suffix is in `TEXT_SUFFIXES`, hidden ones excepted; one document a
file. One file in twenty is held out by a hash of its relative path; where that would hold out nothing or
everything (small folders), the last tenth of the files in hash order.

A single file: its last 10 %, cut at a line end, is held out. Each side is read as sections of about 64 KiB
cut at line ends, a section a document: the order of training is a permutation of documents, and one
document could not be shuffled. So attention does not reach further back than its section's start.
"""

from __future__ import annotations

import codecs
import os
from collections import Counter
from pathlib import Path
from typing import Protocol

from data.corpus import Corpus, Document, drop_duplicates, fingerprint, is_held_out, path_hash
from data.errors import DataError
from naming import did_you_mean

SECTION_BYTES = 64 * 1024
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".log", ".html", ".htm", ".xml", ".css"),
    *(".csv", ".tsv", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java"),
    *(".kt", ".scala", ".swift", ".js", ".ts", ".jsx", ".tsx", ".rb", ".pl", ".lua", ".php", ".r", ".jl"),
    *(".hs", ".ml", ".el", ".sh", ".sql", ".toml", ".yaml", ".yml", ".ini", ".cfg"),
)
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class TextConfig(Protocol):
    input_file: str | None
    data_root: str | None  # prefix for a relative input_file


def load(cfg: TextConfig) -> Corpus:
    """The corpus of `input_file` (relative to `data_root`, else to the working directory).

    Raises:
        DataError: no path given, nothing there, nothing usable in it, or text that is not UTF-8.
    """
    path = resolve_path(cfg.input_file, cfg.data_root)
    if path.is_dir():
        train, heldout, notes = _load_folder(path)
    else:
        train, heldout, notes = _load_file(path)
    return Corpus(path.name, train, heldout, fingerprint(train, heldout), notes)


def resolve_path(input_file: str | None, data_root: str | None) -> Path:
    """The file or folder meant; an error names the part that is missing and what stands beside it."""
    if not input_file:
        raise DataError("data=text needs input_file=<file or folder of UTF-8 text>; none was given.")
    path = Path(data_root or "").expanduser() / Path(input_file).expanduser()
    if path.is_file() or path.is_dir():
        return path
    if path.exists():
        raise DataError(f"input_file {str(path)!r} is neither a regular file nor a folder.")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise DataError(f"input_file {str(path)!r} does not exist: there is no folder {str(parent)!r}.")
    try:
        beside = sorted(os.listdir(parent))
    except OSError as error:
        raise DataError(f"input_file {str(path)!r} cannot be looked up: {error.strerror}.") from error
    raise DataError(f"input_file {str(path)!r} does not exist.{did_you_mean(path.name, beside)}")


def read_text(path: Path) -> bytes:
    """The bytes of a UTF-8 text file without its byte order mark; a DataError names file and byte offset."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    for mark, encoding in _BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            raise DataError(
                f"{str(path)!r} is {encoding} text (byte order mark at byte 0). {_convert(encoding, path)}"
            )
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if (zero := raw.find(b"\0")) >= 0:
        raise DataError(
            f"{str(path)!r} is a binary file: NUL byte at offset {zero}. data=text reads UTF-8 text."
        )
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(path)!r} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}. It may be "
            f"latin-1 (or cp1252). {_convert('latin-1', path)}"
        ) from None
    return raw


def _convert(encoding: str, path: Path) -> str:
    return f"Convert it: iconv -f {encoding} -t utf-8 {path.name} > {path.stem}-utf8{path.suffix}"


def _load_file(path: Path) -> tuple[list[Document], list[Document], tuple[str, ...]]:
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{str(path)!r} is empty: there is no text to train on.")
    cut = _line_end_near(text, len(text) * 9 // 10)
    if cut in (0, len(text)):
        raise DataError(f"{str(path)!r} has {len(text)} bytes: too short to hold out its last 10 %.")
    note = f"held out: the last {len(text) - cut:,} bytes of {path.name}, cut at a line end"
    return _sections(path.name, text, 0, cut), _sections(path.name, text, cut, len(text)), (note,)


def _line_end_near(text: bytes, position: int) -> int:
    """Just behind the first line end at or after `position`, else the last before it, else a character."""
    if 0 < (end := text.find(b"\n", position) + 1) < len(text):
        return end
    if 0 < (end := text.rfind(b"\n", 0, position) + 1) < len(text):
        return end
    while 0 < position < len(text) and text[position] & 0xC0 == 0x80:  # inside a UTF-8 sequence
        position -= 1
    return position


def _sections(name: str, text: bytes, start: int, stop: int) -> list[Document]:
    """Cut text[start:stop] behind line ends (between characters in a line of over 64 KiB) into sections."""
    documents = []
    while start < stop:
        end = min(start + SECTION_BYTES, stop)
        if end < stop:
            line_end = text.rfind(b"\n", start + SECTION_BYTES // 2, end) + 1
            while not line_end and text[end] & 0xC0 == 0x80:
                end -= 1
            end = line_end or end
        documents.append(Document(f"{name}@{start}", text[start:end]))
        start = end
    return documents


def _load_folder(root: Path) -> tuple[list[Document], list[Document], tuple[str, ...]]:
    files, ignored = _text_files(root)
    documents = [Document(relative, read_text(root / relative)) for relative in files]
    kept = [document for document in documents if document.text.strip()]
    kept, duplicates = drop_duplicates(kept)
    notes = []
    if ignored:
        common = ", ".join(f"{suffix or 'no suffix'} ({count})" for suffix, count in ignored.most_common(5))
        notes.append(f"ignored {ignored.total()} files that are not text by suffix: {common}")
    if empty := sum(not document.text.strip() for document in documents):
        notes.append(f"skipped {empty} empty files")
    if duplicates:
        notes.append(f"dropped {duplicates} exact duplicates")
    if not kept:
        found = f" ({'; '.join(notes)})" if notes else ""
        suffixes = " ".join(TEXT_SUFFIXES)
        raise DataError(
            f"{str(root)!r} has no usable text file{found}. Text files are those ending in {suffixes}."
        )
    if len(kept) == 1:
        train, heldout, more = _load_file(root / kept[0].name)
        return train, heldout, (*notes, *more)
    train, heldout, how = _split(kept)
    return train, heldout, (*notes, how)


def _split(documents: list[Document]) -> tuple[list[Document], list[Document], str]:
    held = {document.name for document in documents if is_held_out(document.name)}
    how = f"held out: {len(held)} of {len(documents)} files by path hash"
    if not 0 < len(held) < len(documents):
        order = sorted(documents, key=lambda document: (path_hash(document.name), document.name))
        held = {document.name for document in order[-max(1, len(order) // 10) :]}
        how = f"held out: {len(held)} of {len(documents)} files, the last tenth by path hash (small folder)"
    train = [document for document in documents if document.name not in held]
    return train, [document for document in documents if document.name in held], how


def _text_files(root: Path) -> tuple[list[str], Counter[str]]:
    found: list[str] = []
    ignored: Counter[str] = Counter()
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if name.startswith(".") or not path.is_file():
                continue
            if path.suffix.lower() in TEXT_SUFFIXES:
                found.append(path.relative_to(root).as_posix())
            else:
                ignored[path.suffix.lower()] += 1
    return sorted(found), ignored
