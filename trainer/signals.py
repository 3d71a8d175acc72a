"""SIGTERM and Ctrl-C ask a run to save and leave; the run looks at the request where it can act on it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

__all__ = ["StopSignal"]


class StopSignal:
    """`with StopSignal() as stop:` ... `if stop.requested: ...`

    A second Ctrl-C interrupts at once, for whoever cannot wait for the save.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name = ""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self.name = signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
