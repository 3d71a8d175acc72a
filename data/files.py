"""Text files on disk: which of a folder's files are text, what of it is left out, and reading one.

Nothing is left out in silence: `find_text` says what it did not take and why.
"""

from __future__ import annotations

import codecs
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from data.errors import DataError
from naming import did_you_mean

TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".log", ".html", ".htm", ".xml", ".css"),
    *(".csv", ".tsv", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java"),
    *(".kt", ".scala", ".swift", ".js", ".ts", ".jsx", ".tsx", ".rb", ".pl", ".lua", ".php", ".r", ".jl"),
    *(".hs", ".ml", ".el", ".sh", ".sql", ".toml", ".yaml", ".yml", ".ini", ".cfg"),
)
# Where runs lie, beside the text that they are trained on: a report or a sample is not that text.
RUN_FOLDERS = frozenset({"outputs", "checkpoints", "multirun"})
RUN_FILES = frozenset({"config.yaml", "samples.txt", "report.html"})

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# How a zstd file begins: with a frame, or with one to be skipped (RFC 8878, 3.1).
ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60)))
# How a file begins that a program packed -> what it is, how to have its text.
_PACKED = (
    (b"\x1f\x8b", "gzip-compressed", "gunzip -k {}"),
    (ZSTD, "zstd-compressed", "unzstd {}"),
    (b"\xfd7zXZ\0", "xz-compressed", "unxz -k {}"),
    (b"BZh", "bzip2-compressed", "bunzip2 -k {}"),
    (b"PK\x03\x04", "a zip archive (or an office document)", "unzip {}"),
    (b"%PDF", "a PDF document", "pdftotext {}"),
)


def shown(name: str) -> str:
    """A file's name as it can be printed, whatever its bytes."""
    return name.encode("utf-8", "backslashreplace").decode()


def existing_path(field: str, path: Path) -> Path:
    """`path`, a file or a folder; an error names the part that is missing and what stands beside it."""
    try:
        if path.is_file() or path.is_dir():
            return path
    except OSError as error:
        raise DataError(f"{field} {str(path)!r} cannot be looked up: {error.strerror}.") from error
    if path.is_symlink():
        raise DataError(
            f"{field} {str(path)!r} is a link that leads nowhere. Mend it, or name the file itself"
        )
    if path.exists():
        raise DataError(
            f"{field} {str(path)!r} is neither a regular file nor a folder. Write its text to a file"
        )
    parent = path.absolute().parent
    if not parent.is_dir():
        raise DataError(f"{field} {str(path)!r} does not exist: there is no folder {str(parent)!r}.")
    try:
        beside = sorted(os.listdir(parent))
    except OSError as error:
        raise DataError(f"{field} {str(path)!r} cannot be looked up: {error.strerror}.") from error
    raise DataError(f"{field} {str(path)!r} does not exist.{did_you_mean(path.name, beside)}")


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
        if wide := next(
            (name for name, at in (("utf-16le", 1), ("utf-16be", 0)) if _every_second_is_zero(raw, at)), ""
        ):
            raise DataError(f"{str(path)!r} is {wide} text without a byte order mark. {_convert(wide, path)}")
        raise DataError(
            f"{str(path)!r} is {_packed(raw, path) or f'a binary file: NUL byte at offset {zero}.'} "
            f"data=text reads UTF-8 text."
        )
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if packed := _packed(raw, path):
            raise DataError(f"{str(path)!r} is {packed}") from None
        raise DataError(
            f"{str(path)!r} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}. It may be "
            f"latin-1 (or cp1252). {_convert('latin-1', path)}"
        ) from None
    return raw


def _every_second_is_zero(raw: bytes, at: int) -> bool:
    """Whether nearly every second byte is 0, as in UTF-16 of letters without accents."""
    bytes_ = raw[at:2000:2]
    return bytes_.count(0) > 0.9 * len(bytes_) and raw[1 - at : 2000 : 2].count(0) < 0.1 * len(bytes_)


def _packed(raw: bytes, path: Path) -> str:
    return next(
        (
            f"{what}. Unpack it: {how.format(path.name)}."
            for mark, what, how in _PACKED
            if raw.startswith(mark)
        ),
        "",
    )


def _convert(encoding: str, path: Path) -> str:
    return f"Convert it: iconv -f {encoding} -t utf-8 {path.name} > {path.stem}-utf8{path.suffix}"


def find_text(root: Path) -> tuple[list[str], list[str]]:
    """`find_files` of text."""
    return find_files(root, TEXT_SUFFIXES, "text")


def find_files(root: Path, suffixes: tuple[str, ...], what: str) -> tuple[list[str], list[str]]:
    """Relative POSIX paths of the files below a folder that end so, sorted; and sentences about what else is there.

    Raises:
        DataError: a folder in it cannot be read.
    """
    found: list[str] = []
    ignored: Counter[str] = Counter()
    left_out: dict[str, list[str]] = defaultdict(list)  # why -> relative paths

    def unreadable(error: OSError) -> None:
        raise DataError(f"folder {error.filename!r} cannot be read: {error.strerror}. Mend its permissions")

    for folder, subfolders, files in os.walk(root, onerror=unreadable):
        here = Path(folder)
        for name in sorted([*subfolders, *files]):
            relative = (here / name).relative_to(root).as_posix()
            if why := _why_not(here / name, root):
                left_out[why].append(relative)
            elif name in files and name.lower().endswith(suffixes):
                found.append(relative)
            elif name in files:
                ignored[Path(name).suffix.lower()] += 1
        gone = {relative for names in left_out.values() for relative in names}
        subfolders[:] = [
            name for name in subfolders if (here / name).relative_to(root).as_posix() not in gone
        ]
    return sorted(found), [
        *_by_suffix(ignored, what),
        *(_listed(why, names) for why, names in left_out.items()),
    ]


def _why_not(path: Path, root: Path) -> str:
    """Why a file or folder below `root` is not looked at; nothing where it is."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_symlink() and path.is_dir():
        return "links to folders, which are not followed"
    if path.is_dir():
        if (path.parent == root and path.name in RUN_FOLDERS) or _is_of_a_run(path):
            return "folders of runs"
        return ""
    if path.name in RUN_FILES and path.parent == root and _is_of_a_run(root):
        return "files of a run"
    if not path.is_file():
        return "links to nothing, pipes and devices"
    return "printed to by this very command" if _is_printed_to(path) else ""


def _is_of_a_run(folder: Path) -> bool:
    """Whether a folder is one that the trainer or a sweep made."""
    made = ("manifest.json", "metrics.jsonl", ".lock")
    return (
        ((folder / "config.yaml").exists() and any((folder / name).exists() for name in made))
        or (folder / "training_state.json").exists()
        or (folder / "multirun.yaml").exists()
    )


def _is_printed_to(path: Path) -> bool:
    """Whether standard output or error goes to this file (`mytrainer.py ... > train.log`)."""
    status = path.stat()
    for stream in (1, 2):
        try:
            if os.path.samestat(os.fstat(stream), status):
                return True
        except OSError:  # closed
            continue
    return False


def _by_suffix(ignored: Counter[str], what: str) -> Iterable[str]:
    if ignored:
        common = ", ".join(f"{suffix or 'no suffix'} ({count})" for suffix, count in ignored.most_common(5))
        yield f"ignored {ignored.total():,} files that are not {what} by suffix: {shown(common)}"


def _listed(why: str, names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"left out ({why}): {shown(', '.join(names[:3]))}{more}"


def looks_held_out(path: str) -> bool:
    """Whether a path is named as held-out text usually is: `val.txt`, `dev/a.md`, `my-test.txt`."""
    words = re.split(r"[^a-z]+", path.lower())
    return bool({"val", "valid", "validation", "dev", "test", "eval", "heldout", "holdout"} & set(words))
