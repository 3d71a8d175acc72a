"""Where text for people goes: standard output and error, whatever is at their other end.

A pipe may speak cp1252 or ASCII, its reader may leave (`| head`), a terminal may be closed, a log's disk may be full,
and a descriptor may have been closed before Python started (`>&-`). None of it is worth a run.

What is printed may be a stranger's: text of a model, names of files. On a terminal, which obeys what it reads, it is
shown and not obeyed. Secrets that a run has taken are shown nowhere.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from configs.concealed import conceal

__all__ = ["PatientStream", "escaped", "of_our_own", "patient", "patient_streams", "silence"]

# What a terminal takes for a command (C0 but for tab and line break, DEL, C1), and what reorders a line.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """`text` as a terminal shows it and obeys none of it: a control character stands as `\\x1b`."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PatientStream:
    """A text stream that takes any text, and stays quiet once nobody can read it any more.

    Characters that the stream's encoding lacks are written as `\\xe9`, and on a terminal those that it would obey.
    `raises`: tell the writer when the reader has left, by BrokenPipeError, for commands whose whole purpose is what
    they print. `obeyed`: what is written here is ours, and may move the cursor.
    """

    def __init__(self, stream: TextIO, raises: bool = False, obeyed: bool = False) -> None:
        self._stream, self._raises, self._silent = stream, raises, False
        self._shows = not obeyed and _is_terminal(stream)

    def write(self, text: str) -> int:
        if not self._silent:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            shown = conceal(text)
            shown = escaped(shown) if self._shows else shown
            self._try(lambda: self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding)))
        return len(text)

    def of_our_own(self) -> PatientStream:
        """The same stream, for text of which the terminal obeys all."""
        return PatientStream(self._stream, self._raises, obeyed=True)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        if not self._silent:
            self._try(self._stream.flush)

    def _try(self, work: Any) -> None:
        try:
            work()
        except OSError as error:
            self._silent = True
            silence(self._stream)
            if self._raises and isinstance(error, BrokenPipeError):
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def patient(stream: TextIO, raises: bool = False) -> TextIO:
    """The stream as a `PatientStream`, which it may be already."""
    return stream if isinstance(stream, PatientStream) else cast(TextIO, PatientStream(stream, raises))


def of_our_own(stream: TextIO) -> TextIO:
    """The stream to move its cursor by. Nothing of a stranger's goes there but `escaped`."""
    return cast(TextIO, stream.of_our_own()) if isinstance(stream, PatientStream) else stream


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # no file, or a closed one
        return False


def silence(stream: TextIO) -> None:
    """Let what is still in the stream's buffer, and what libraries and child processes write, go nowhere."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # a stream of Python's own
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


@contextmanager
def patient_streams(raises: bool) -> Iterator[None]:
    """While open, sys.stdout and sys.stderr are patient. `raises`: see `PatientStream`; standard error never does."""
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout = patient(sys.stdout or _nowhere(), raises)
    sys.stderr = patient(sys.stderr or _nowhere())
    try:
        yield
    finally:
        try:
            sys.stdout.flush()  # here, as the interpreter's own last flush ends in a status of 120 where it fails
        finally:
            sys.stdout, sys.stderr = before


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _open_closed_descriptors() -> None:
    """The next file to be opened would become standard output, and be written to by whoever prints."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
