"""One line for everything that was looked at, and what to do where it is a problem."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from naming import load

__all__ = ["Line", "lines_of", "note", "ok", "problem", "said_by", "size", "tried"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Line:
    """`about`: what was looked at; `text`: what was found; `remedy`: what to do about it. A "note" costs nothing but
    what it says."""

    state: Literal["ok", "note", "problem"]
    about: str
    text: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ok(about: str, text: str) -> Line:
    return Line("ok", about, text)


def note(about: str, text: str, remedy: str = "") -> Line:
    return Line("note", about, text, remedy)


def problem(about: str, text: str, remedy: str) -> Line:
    return Line("problem", about, text, remedy)


def lines_of(section: str, where: str) -> Iterator[Line]:
    """The lines that "module:function" yields, as they come."""
    yield from tried(section, lambda: load(where)())


def tried(about: str, look: Callable[..., Line | Iterable[Line]], *args: Any) -> Iterator[Line]:
    """The lines that come of `look(*args)`. Whatever it raises, or an import in it does, is one more line."""
    try:
        found = look(*args)
        yield from [found] if isinstance(found, Line) else found
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        remedy = "mend what the message names, or report it; all else is looked at"
        if isinstance(error, ImportError):
            remedy = f"see versions above; in {ROOT}: {sys.executable} -m pip install -e ."
        place = f"{Path(last.filename).name}:{last.lineno}"
        yield problem(about, f"cannot be looked at: {said_by(error)} ({place})", remedy)


def said_by(error: BaseException) -> str:
    """Kind and first line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def size(count: float) -> str:
    """Bytes as people read them: `512 kB`, `1.4 GB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"
