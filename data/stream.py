"""Text that comes as a stream of documents, from files of any number and size: what `data=jsonl` and its like read.

A source says which parts (files) hold its text and how a part gives its rows; everything behind that is one for all
(`data/kept.py`): the split, what is left out, names, the cache, order, tokens. A part is read once from its start to
its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from data.errors import DataError

if TYPE_CHECKING:
    from data.kept import KeptText

__all__ = ["FilePart", "Part", "Row", "Stream", "fields_of", "joined", "utf8"]

Stamp = tuple[str, int, int]  # absolute path, bytes, modification time in ns


class Row(NamedTuple):
    """`place` is where a part has it, counted from 1 (a line, a row, an id); `text` None where there is null for it.
    `length`: of how many ids, where parts hold ids."""

    place: int
    text: bytes | None
    length: int = 0


class Part(Protocol):
    """`name` is for people, and the same on any machine. `stamps` change when the part does."""

    @property
    def name(self) -> str: ...

    def stamps(self) -> list[Stamp]: ...

    def rows(self) -> Iterator[Row]:
        """All rows in order. DataError names the part and the row that cannot be read."""
        ...


@dataclass(frozen=True)
class Stream:
    """`heldout` None: documents are held out by a hash of their text; `whole` holds out all.
    `by_hash`: even where that holds out most of it.

    `read_as` is what decides, beside the parts, what text they give, as JSON. `notes` are sentences for the user.
    `chats`: documents are chats (`data/chats/messages.py`).
    `kept`: how the text is kept, if not as it is: a class derived from `data.kept.KeptText`.
    """

    name: str
    train: Sequence[Part]
    heldout: Sequence[Part] | None
    read_as: Mapping[str, Any]
    by_hash: bool = False
    notes: tuple[str, ...] = ()
    kept: type[KeptText] | None = None
    chats: bool = False

    def whole(self) -> Stream:
        """All of it as held-out text."""
        return replace(self, train=(), heldout=[*(self.heldout or ()), *self.train])


@dataclass(frozen=True)
class FilePart:
    """A part that is one file."""

    name: str
    path: Path

    def stamps(self) -> list[Stamp]:
        try:
            status = self.path.stat()
        except OSError as error:
            raise DataError(f"{str(self.path)!r} cannot be read: {error.strerror}.") from error
        return [(str(self.path.absolute()), status.st_size, status.st_mtime_ns)]


def fields_of(text_field: str | Sequence[str]) -> tuple[str, ...]:
    """The fields whose text makes up that of a document."""
    return (text_field,) if isinstance(text_field, str) else tuple(text_field)


def joined(texts: Sequence[str | None]) -> str | None:
    """The text of several fields: those that are not empty, a blank line between them. None where all are null."""
    if len(texts) == 1:
        return texts[0]
    said = [text for text in texts if text is not None]
    return "\n\n".join(text for text in said if text.strip()) if said else None


def utf8(text: str) -> bytes:
    """UTF-8 bytes of a text; a lone surrogate, which valid JSON may hold, becomes U+FFFD."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
