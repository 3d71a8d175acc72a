"""Where text for people goes: standard output and error, whatever is at their other end.

A pipe may speak cp1252 or ASCII, its reader may leave (`| head`), a terminal may be closed, a log's disk may be full,
and a descriptor may have been closed before Python started (`>&-`). None of it is worth a run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

__all__ = ["PatientStream", "patient", "patient_streams", "silence"]


class PatientStream:
    """A text stream that takes any text, and stays quiet once nobody can read it any more.

    Characters that the stream's encoding lacks are written as `\\xe9`. `raises`: tell the writer when the reader has
    left, by BrokenPipeError, for commands whose whole purpose is what they print.
    """

    def __init__(self, stream: TextIO, raises: bool = False) -> None:
        self._stream, self._raises, self._silent = stream, raises, False

    def write(self, text: str) -> int:
        if not self._silent:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._try(lambda: self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
        return len(text)

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
