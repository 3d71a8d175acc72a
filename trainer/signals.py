"""What asks a run to save and leave: Ctrl-C, a batch system, a terminal that is closed.

A request gets its word at once, from a thread of its own, whatever the run is busy with; the run looks at it where it
can act on it. Before there is anything to save it leaves where it stands.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from configs.hardware import process_group
from trainer.errors import StopRequested

__all__ = ["StopSignal", "as_guest", "hold_stop_signals", "pass_on", "stop_signals"]

# SIGUSR1 and SIGUSR2: SLURM (--signal) and submitit announce the end of a job's time with them.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
# A launcher such as torchrun passes on a Ctrl-C that the terminal has sent to every process already.
_SAME_CTRL_C = 0.5  # seconds
_SHOW_CURSOR = b"\x1b[?25h"  # which the live line of a terminal hides


def stop_signals() -> list[int]:
    """Those of this platform; SIGHUP not where it is ignored already (nohup), and none whose handler Python
    could not put back, as that of a program which Python is embedded in."""
    there = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    there = [n for n in there if signal.getsignal(n) is not None]
    return [n for n in there if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


def hold_stop_signals() -> None:
    """Let requests wait until a `StopSignal` listens."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())


_guest = False


@contextmanager
def as_guest() -> Iterator[None]:
    """While open, the process is somebody else's: it is never ended, and a request that was served goes on to him."""
    global _guest
    before, _guest = _guest, True
    try:
        yield
    finally:
        _guest = before


def pass_on(number: int) -> None:
    """As a guest: do what the process does when asked so; at least raise KeyboardInterrupt. Else nothing."""
    if _guest:
        signal.raise_signal(number)
        raise KeyboardInterrupt


class StopSignal:
    """`with StopSignal("saving, then leaving") as stop:` ... `if stop.requested: ...`

    A second Ctrl-C ends the process at once (as a guest: raises KeyboardInterrupt). That harms no file: all are
    replaced in one go or left as they were. On another thread than the main one nothing is heard.
    """

    def __init__(self, then: str = "leaving") -> None:
        self.requested = False
        self.name = ""
        self._then = then
        self._number, self._since = 0, 0.0  # of the first request
        self._raises = self._left = False  # `at_once` is open; a request has been acted on by it
        self._previous: dict[int, object] = {}

    @property
    def status(self) -> int:
        """With which a process ends that was asked to and had nothing to save; the request may have been another's."""
        return 128 + (self._number or signal.SIGTERM)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While open, where there is nothing to save yet, a request raises StopRequested wherever it arrives."""
        if self.requested:
            raise StopRequested
        before, self._raises = self._raises, True
        try:
            yield
        finally:
            self._raises = before

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._listen()
            self._previous = {n: signal.signal(n, self._handle) for n in stop_signals()}
            if hasattr(signal, "pthread_sigmask"):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, self._previous)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._woke_before)
        os.write(self._writer, b"\0")  # no signal: the thread leaves
        self._thread.join()
        os.close(self._writer)
        if self.requested:
            pass_on(self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """On the main thread, between two operations of Python."""
        if not self.requested:
            self._number, self._since = number, time.monotonic()
        elif _guest and number == signal.SIGINT and time.monotonic() - self._since > _SAME_CTRL_C:
            raise KeyboardInterrupt
        self.requested = True
        self.name = signal.Signals(number).name
        if self._raises:
            self._raises, self._left = False, True
            raise StopRequested

    # -- the thread that hears it at once, also while the main one is in a long operation ------------------------------

    def _listen(self) -> None:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._woke_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._hear, args=(reader,), name="signals", daemon=True)
        self._thread.start()

    def _hear(self, reader: int) -> None:
        first = 0.0  # when the first request came
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            while (number := pipe.read(1)[0]) != 0:
                if number not in self._previous:
                    continue
                now = time.monotonic()
                if not first:
                    first = now
                    again = "; Ctrl-C again: at once" if number == signal.SIGINT else ""
                    if not self._left:
                        _say(f"{signal.Signals(number).name} received: {self._then}{again}")
                elif number == signal.SIGINT and now - first > _SAME_CTRL_C and not _guest:
                    _say("left at once: what was saved before is as it was")
                    os._exit(128 + number)


def _say(text: str) -> None:
    """On standard error and past Python's streams, which the main thread may be writing to."""
    if process_group()[0] != 0:  # said once
        return
    with suppress(OSError):
        os.write(2, (_SHOW_CURSOR + b"\n" if os.isatty(2) else b"") + f"{text}\n".encode())
