"""`data=jsonl`: files of JSON objects, one a line, whose `text_field` is the text of a document; also gzip- and
zstd-compressed, in one member or several.

A line ends at a line feed alone. A row whose text is null or empty is left out and counted; one without the field, with
something else than a string in it, or that is no JSON ends the reading: it is named by file and line. Other fields are
not looked at.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from data import named
from data.chats.messages import chat_document
from data.config import CHATS, Mode
from data.errors import DataError
from data.files import ZSTD
from data.named import KINDS, FilesConfig, named_files
from data.stream import FilePart, Row, Stream, fields_of, joined, utf8
from naming import did_you_mean, shorten

GZIP = b"\x1f\x8b"
# Bytes of a zstd file that are unpacked together: what comes of them is not bounded, and usually ten times as much.
ZSTD_BLOCK = 4096
# Text is packed to a tenth, and rarely to a hundredth; what unpacks to more is made to fill memory and disks.
RATIO, SPARED = 200, 1 << 24  # so many bytes of a file may be anything
MEND = "Mend the line, or take it out of the file"
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class _Number(str):
    """A number as it is written: some in other fields are longer than Python reads."""


_DECODER = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_Number)
_WHAT = {_Number: "a number", bool: "true or false", list: "a list", dict: "an object", str: "a string"}


class _BadZstd(Exception):
    """What the optional package raises has no place in an except clause where it is not installed."""


class JsonlConfig(FilesConfig, Protocol):
    text_field: str | list[str]
    training_mode: Mode


def load(cfg: JsonlConfig) -> Stream:
    """The files that `train_files` or `input_file`, and `val_files`, name.

    Raises:
        DataError: no such files, or nothing says which of them are held out.
    """
    files = named_files(cfg, KINDS["jsonl"])
    chats = cfg.training_mode == CHATS
    return files.stream(
        lambda name, path: JsonlPart(name, path, cfg.text_field, chats), cfg.text_field, chats
    )


def absolute(cfg: JsonlConfig) -> dict[str, list[str]]:
    """As `data.named.absolute`."""
    return named.absolute(cfg, KINDS["jsonl"])


@dataclass(frozen=True)
class JsonlPart(FilePart):
    """One file. `field`: that with the text, or several that make it up; with `chats` those of a chat."""

    field: str | Sequence[str]
    chats: bool = False

    def rows(self) -> Iterator[Row]:
        line = 0
        try:
            with open(self.path, "rb") as file, closing(_unpacked(file, self.path)) as lines:
                for line, raw in enumerate(lines, start=1):
                    if line == 1:
                        raw = self._without_mark(raw)
                    if raw.strip():
                        yield Row(line, self._text(raw, line))
        except (EOFError, gzip.BadGzipFile, zlib.error, _BadZstd) as error:
            raise DataError(
                f"{str(self.path)!r} is damaged or cut off behind line {line:,}: {error}. Fetch it again"
            ) from error
        except OSError as error:
            raise DataError(f"{str(self.path)!r} cannot be read: {error.strerror or error}.") from error

    def _without_mark(self, raw: bytes) -> bytes:
        if raw.startswith(_WIDE):
            raise DataError(
                f"{str(self.path)!r} is utf-16 text (byte order mark at byte 0), and JSON lines are UTF-8. Convert it: "
                f"iconv -f utf-16 -t utf-8 {self.path.name} > {self.path.stem}-utf8{self.path.suffix}"
            )
        return raw.removeprefix(codecs.BOM_UTF8)

    def _text(self, raw: bytes, line: int) -> bytes | None:
        where = f"{str(self.path)!r}, line {line:,}"
        try:
            row = _DECODER.decode(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start} of it. {MEND}"
            ) from None
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}. {MEND}") from None
        except RecursionError:
            raise DataError(f"{where} is nested too deeply to be read. {MEND}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where} is {_WHAT.get(type(row), 'null')}, not a JSON object. {MEND}")
        if self.chats:
            return chat_document(row, self.field, where)
        text = joined([self._text_of(row, name, where) for name in fields_of(self.field)])
        return None if text is None else utf8(text)

    def _text_of(self, row: dict[str, Any], field: str, where: str) -> str | None:
        if field not in row:
            has = f"it has {shorten([repr(name) for name in row])}" if row else "it is empty"
            raise DataError(
                f"{where} lacks the field {field!r} ({has}). Set text_field=<the one with the text>."
                f"{did_you_mean(field, row)}"
            )
        text = row[field]
        if text is not None and type(text) is not str:
            raise DataError(
                f"{where}: {field!r} is {_WHAT[type(text)]}, and the text of a document is a string. "
                f"Mend the line, or set text_field=<the one with the text>"
            )
        return text


# -- compressed files ----------------------------------------------------------------------------------------------


def _unpacked(file: IO[bytes], path: Path) -> IO[bytes] | io.BufferedIOBase:
    """What a file holds, by how it begins and not by its name, but where it ends before that is plain."""
    start = file.read(4)
    file.seek(0)
    if start.startswith(GZIP):
        return io.BufferedReader(_Bounded(gzip.GzipFile(fileobj=file, mode="rb"), file, path), 1 << 16)
    cut = 0 < len(start) < 4 and path.suffix == ".zst" and any(mark.startswith(start) for mark in ZSTD)
    if start in ZSTD or cut:
        return io.BufferedReader(_Bounded(_Frames(file, path), file, path), 1 << 16)
    return file


class _Bounded(io.RawIOBase):
    """What comes of `packed`, as long as it is not more than text can be. DataError from there on."""

    def __init__(self, unpacked: gzip.GzipFile | io.RawIOBase, packed: IO[bytes], path: Path):
        self._unpacked, self._packed, self._path = unpacked, packed, path
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._unpacked.readinto(buffer)  # type: ignore[assignment]
        self._count += count
        if self._count > max(SPARED, RATIO * (read := self._packed.tell())):
            raise DataError(
                f"{str(self._path)!r} unpacks to more than {RATIO} times its size ({self._count:,} bytes of the first "
                f"{read:,}), which no text does. If it is meant, unpack it yourself"
            )
        return count


class _Frames(io.RawIOBase):
    """The frames of a zstd file, one behind the other."""

    def __init__(self, file: IO[bytes], path: Path):
        self._file, self._path = file, path
        self._chunks = self._unpack()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._rest = chunk
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _unpack(self) -> Iterator[bytes]:
        try:
            import zstandard
        except ImportError:
            raise DataError(
                f"{str(self._path)!r} is zstd-compressed, and the package zstandard is not installed: "
                f"pip install -e '.[data]', or unpack it: unzstd {self._path.name}"
            ) from None
        whole = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        frame = None
        try:
            while packed := self._file.read(ZSTD_BLOCK):
                while packed:
                    frame = frame or whole.decompressobj()
                    yield frame.decompress(packed)
                    packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        except zstandard.ZstdError as error:
            raise _BadZstd(str(error)) from error
        if frame is not None:
            raise _BadZstd("it ends inside a zstd frame")
