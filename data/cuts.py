"""Files cut into documents: at separators, or in sections where one document would be the whole text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from data.corpus import Document
from data.errors import DataError

SECTION_BYTES = 64 * 1024
USUAL_SEPARATOR = "<|endoftext|>"


def documents_of(
    files: Sequence[Document], separator: str | None, *, in_sections: bool = False
) -> list[Document]:
    """Files cut at their separators; one that has none stays whole, or is cut into sections."""
    documents = []
    for file in files:
        parts = separated(file, separator) if separator else []
        if not parts:
            parts = sections(file.name, file.text, 0, len(file.text)) if in_sections else [file]
        documents += parts
    return documents


def separated(file: Document, separator: str) -> list[Document]:
    """The documents between lines that consist of the separator; none where there is no such line."""
    ends = [match.span() for match in _line(separator).finditer(file.text)]
    if not ends:
        return []
    spans = zip(
        [0, *(stop for _, stop in ends)], [*(start for start, _ in ends), len(file.text)], strict=True
    )
    return [
        Document(f"{file.name}@{start}", file.text[start:stop])
        for start, stop in spans
        if file.text[start:stop].strip()
    ]


def _line(separator: str) -> re.Pattern[bytes]:
    return re.compile(rb"^[ \t]*" + re.escape(separator.encode()) + rb"[ \t\r]*(?:\n|\Z)", re.MULTILINE)


def sections(name: str, text: bytes, start: int, stop: int) -> list[Document]:
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


def about_separator(files: Sequence[Document], separator: str | None) -> list[str]:
    """A note where the usual separator is there and not used. DataError where the one that is to be used is not."""
    if separator is None:
        holding = [file for file in files if USUAL_SEPARATOR.encode() in file.text]
        used = sum(len(_line(USUAL_SEPARATOR).findall(file.text)) for file in holding)
        hint = f"document_separator='{USUAL_SEPARATOR}' makes a document of what stands between them"
        return [f"{used:,} lines are {USUAL_SEPARATOR} and are read as text: {hint}"] if used else []
    if not any(_line(separator).search(file.text) for file in files):
        inside = sum(file.text.count(separator.encode()) for file in files)
        where = f"; it stands {inside:,} times within lines: give it lines of its own" if inside else ""
        raise DataError(
            f"document_separator: no line of the text is {separator!r}{where or '. Leave it out, or mend it'}"
        )
    return []


def line_end_near(text: bytes, position: int) -> int:
    """Just behind the first line end at or after `position`, else the last before it, else a character."""
    if 0 < (end := text.find(b"\n", position) + 1) < len(text):
        return end
    if 0 < (end := text.rfind(b"\n", 0, position) + 1) < len(text):
        return end
    while 0 < position < len(text) and text[position] & 0xC0 == 0x80:  # inside a UTF-8 sequence
        position -= 1
    return position
