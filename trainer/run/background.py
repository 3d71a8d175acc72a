"""A sink that cannot hurt a run: whatever it does, it does in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from trainer.errors import sentence
from trainer.run.facts import Facts
from trainer.run.sinks import Sink

__all__ = ["InBackground"]

MOST_WAITING = 1000  # calls
PATIENCE = 5.0  # seconds, at the end


class InBackground:
    """Hands everything to `sink` through a bounded queue.

    The sink is dropped, with one note, when it raises, when the queue is full, or when it is not done PATIENCE seconds
    after `close`. The note is made by the thread that calls this object, so that two never print at once.
    """

    def __init__(self, name: str, sink: Sink, note: Callable[[str], None]) -> None:
        self._name, self._sink, self._note = name, sink, note
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(MOST_WAITING)
        self._error: BaseException | None = None
        self._dropped = False
        # A daemon: one that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def begin(self, facts: Facts) -> None:
        self._ask("begin", facts)

    def step(self, line: dict[str, Any]) -> None:
        self._ask("step", line)

    def evaluation(self, line: dict[str, Any]) -> None:
        self._ask("evaluation", line)

    def finish(self, summary: dict[str, Any]) -> None:
        self._ask("finish", summary)

    def close(self) -> None:
        self._ask("close")
        if not self._dropped:
            self._thread.join(PATIENCE)
        if self._error is not None:
            self._drop(sentence(self._error))
        elif self._thread.is_alive():
            self._drop(f"it was not done {PATIENCE:g} seconds after the run")

    def _ask(self, method: str, *arguments: Any) -> None:
        if self._dropped:
            return
        if self._error is not None:
            self._drop(sentence(self._error))
            return
        try:
            self._calls.put_nowait((method, arguments))
        except queue.Full:
            self._drop(f"it is {MOST_WAITING} lines behind")

    def _drop(self, why: str) -> None:
        if not self._dropped:
            self._dropped = True
            self._note(f"{self._name}: {why}. The run goes on without it; metrics.jsonl has everything")

    def _work(self) -> None:
        while not self._dropped:
            method, arguments = self._calls.get()
            try:
                getattr(self._sink, method)(*arguments)
            except BaseException as error:
                self._error = error
                return
            if method == "close":
                return
