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

__all__ = ["FilePart", "Part", "Row", "Stream", "require_one_field", "utf8"]

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
    `kept`: how the text is kept, if not as it is: a class derived from `data.kept.KeptText`.
    """

    name: str
    train: Sequence[Part]
    heldout: Sequence[Part] | None
    read_as: Mapping[str, Any]
    by_hash: bool = False
    notes: tuple[str, ...] = ()
    kept: type[KeptText] | None = None

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


def require_one_field(text_field: str) -> None:
    """DataError for a `text_field` that lists several, which a command line gives as text."""
    if text_field.startswith("[") and text_field.endswith("]"):
        raise DataError(
            f"text_field: {text_field!r} is a list, and the text of a document is that of one field. Name one; where "
            f"several make up the text, write them into one first"
        )


def utf8(text: str) -> bytes:
    """UTF-8 bytes of a text; a lone surrogate, which valid JSON may hold, becomes U+FFFD."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
