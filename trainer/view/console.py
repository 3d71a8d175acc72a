"""What a person sees of a run: one live line on a terminal, one line per log interval when piped.

On a terminal the line of the present step is rewritten in place (rich) and everything else scrolls above it.
Piped, nothing is ever rewritten and no escape codes appear. NO_COLOR and TERM=dumb are respected. Lines are
built for 80 columns.
"""

import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from trainer.view.format import (
    YARDSTICK_NOTES,
    bits_per_byte,
    duration,
    of_sources,
    printable,
    quantity,
    ranking,
    ranking_notes,
)
from trainer.view.stream import escaped, of_our_own, patient

__all__ = ["Console"]

WIDTH = 80
FIRST_WORD, LAST_WORDS = 4.0, 60.0  # seconds of silence: at first, at most


class Console:
    """Prints for one process; `enabled` is false on all ranks but 0, where every method does nothing.

    Args:
        enabled: whether to print at all.
        live: rewrite the step line in place; None = if `stream` is a terminal.
        stream: standard output by default.
    """

    def __init__(self, enabled: bool = True, live: bool | None = None, stream: TextIO | None = None) -> None:
        self._enabled = enabled
        self._stream = patient(stream or sys.stdout)
        if live is None:
            live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        own = of_our_own(self._stream)  # what comes there is escaped before
        self._rich = RichConsole(file=own, force_terminal=True, highlight=False) if live else None
        self._live: Live | None = None
        self._lock = threading.Lock()  # `doing` prints from a thread

    # -- messages ------------------------------------------------------------------------------------------

    def banner(self, lines: list[str]) -> None:
        """What is about to run."""
        for line in lines:
            self._print(line, "bold" if line is lines[0] else "")
        self._print("")

    def note(self, text: str) -> None:
        self._print(text, "cyan")

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", "yellow")

    @contextmanager
    def doing(self, what: str) -> Iterator[Callable[[str], None]]:
        """Around what may take long: says so once it has, and then and when, from a thread of its own.

        Yields a function to call when it has come to something else; "" where that shows by itself.
        """
        done = threading.Event()
        now = [(what, time.monotonic())]

        def tell() -> None:
            pause = FIRST_WORD
            while not done.wait(pause):
                text, since = now[-1]
                if text:
                    self._print(f"{text} ... {duration(time.monotonic() - since)}", "dim")
                pause = min(2 * pause, LAST_WORDS)

        thread = threading.Thread(target=tell, name="console", daemon=True)
        if self._enabled:
            thread.start()
        try:
            yield lambda text: now.append((text, time.monotonic()))
        finally:
            done.set()
            if self._enabled:
                thread.join()

    # -- progress ------------------------------------------------------------------------------------------

    def step(self, line: dict[str, Any], metrics: Sequence[str] = ()) -> None:
        """One log line: `step`, `total_steps` (or `total`), `loss`; where known `bits_per_byte`,
        `tokens_per_second`, `mfu` (0 to 1), `eta_seconds`, and `lr/<role>`; and `metrics`."""
        if not self._enabled:
            return
        if self._rich is None:
            # A file has room for what an adapter wants to be seen.
            self._print(step_line(line, WIDTH + sum(len(name) + 13 for name in metrics), metrics))
        else:
            self.progress(step_line(line, self._rich.width, metrics))

    @property
    def is_live(self) -> bool:
        """Whether lines of progress are rewritten in place."""
        return self._rich is not None

    def progress(self, line: str) -> None:
        """A line that the next one takes the place of."""
        if not self._enabled:
            return
        if self._rich is None:
            self._print(line)
            return
        if self._live is None:
            self._live = Live(console=self._rich, auto_refresh=False, transient=True)
            before = sys.stdout, sys.stderr
            self._live.start()
            if (sys.stdout, sys.stderr) != before:  # what others print goes through Rich until it stops
                sys.stdout, sys.stderr = patient(sys.stdout), patient(sys.stderr)
        self._live.update(Text(escaped(line), no_wrap=True, overflow="crop"), refresh=True)

    def evaluation(self, line: dict[str, Any]) -> None:
        """A line of `val_...` values of a score; stays on the screen."""
        parts = [f"step {line['step']}", f"held out {bits_per_byte(line, 'val_')} bits/byte"]
        if sources := of_sources(line, "val_"):
            parts[-1] += f" ({sources})"
        if (perplexity := line.get("val_perplexity")) is not None:
            at_most = "<= " if line.get("val_kind") == "bound" else ""
            parts.append(f"perplexity {at_most}{perplexity:.2f} per token")
        if (scored := line.get("val_bytes")) is not None:
            parts.append(f"{quantity(scored)}B scored")
        self._print("  ".join(parts), "bold")

    # -- the end -------------------------------------------------------------------------------------------

    def score_table(
        self, score: dict[str, Any], yardsticks: dict[str, float], best: dict[str, Any] | None = None
    ) -> None:
        """The final score, and that of the best model where one is kept, among what simple methods reach on the same
        text."""
        self.close()
        self._print("")
        self._print("bits per byte of the held-out text, lower is better")
        rows = ranking(score, yardsticks, best)
        names = max(len(name) for name, *_ in rows)
        numbers = max(len(_aligned(number)) for _, _, number, _ in rows)
        for name, _, number, ours in rows:
            mark = ">" if ours else " "
            line = f"{mark} {name:<{names}}  {_aligned(number):<{numbers}}  {YARDSTICK_NOTES.get(name, '')}"
            self._print(line.rstrip(), "bold green" if ours else "")
        if sources := of_sources(score):
            self._print(f"  by source: {sources}")
        for note in ranking_notes(score, yardsticks):
            self._print(f"  {note}")

    def sample(self, text: str | bytes) -> None:
        """A generated text, indented; long lines are folded, unprintable characters escaped."""
        self._print("")
        self._print("sample")
        for line in printable(text).split("\n"):
            for part in textwrap.wrap(line, WIDTH - 2, drop_whitespace=False, break_on_hyphens=False) or [""]:
                self._print(f"  {part}".rstrip())

    def finish(self, run_dir: Path, commands: list[str]) -> None:
        """Where the run lies and what to try next. Commands stay on one line, to be copied."""
        self.close()
        self._print("")
        self._print(f"run folder  {run_dir}")
        if (report := Path(run_dir) / "report.html").exists():
            self._print(f"report      {report}")
        if commands:
            self._print("next")
        for command in commands:
            self._print(f"  {command}", "cyan")

    def close(self) -> None:
        """Remove the live line and give the cursor back. Printing may go on."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    # -- output --------------------------------------------------------------------------------------------

    def _print(self, text: str, style: str = "") -> None:
        if not self._enabled:
            return
        with self._lock:
            self._write(text, style)

    def _write(self, text: str, style: str) -> None:
        if self._rich is None:
            print(text, file=self._stream, flush=True)
        else:
            # soft_wrap leaves long lines to the terminal, so that a command copies as one line.
            self._rich.print(Text(escaped(text), style=style), soft_wrap=True)


def step_line(line: dict[str, Any], width: int, metrics: Sequence[str] = ()) -> str:
    """Fields of constant width in a fixed order; the learning rate goes first where they do not fit, then the others up
    to the speed, then `metrics`, the last one first."""
    total = line.get("total_steps")
    places = len(str(total)) if total is not None else 6
    fields = {
        "step": f"{line['step']:>{places}}" + (f"/{total}" if total is not None else ""),
        "loss": f"loss {line['loss']:6.3f}",
    }
    if (bits := line.get("bits_per_byte")) is not None:
        fields["bits"] = f"bits/byte {bits:5.3f}"
    for name in metrics:
        value = f"{line[name]:.4g}" if name in line else "-"
        fields[f"metric {name}"] = f"{name} {value:>10}"
    if (speed := line.get("tokens_per_second")) is not None:
        fields["speed"] = f"{quantity(speed):>5} tok/s"
    if (mfu := line.get("mfu")) is not None:
        fields["mfu"] = f"mfu {100 * mfu:4.1f}%"
    if (rate := _learning_rate(line)) is not None:
        fields["rate"] = f"lr {rate:.1e}"
    if (left := line.get("eta_seconds")) is not None:
        fields["left"] = f"{duration(left):>6} left"
    for expendable in ("rate", "mfu", "speed", *(f"metric {name}" for name in reversed(metrics))):
        if len("  ".join(fields.values())) > width:
            fields.pop(expendable, None)
    return "  ".join(fields.values())


def _learning_rate(line: dict[str, Any]) -> float | None:
    """The matrices' rate where roles differ: most parameters follow it."""
    rates = {key: value for key, value in line.items() if key.startswith("lr/")}
    return rates.get("lr/matrix", next(iter(rates.values()), None))


def _aligned(number: str) -> str:
    """Room for `<= ` before exact numbers, so that the digits of all rows stand in one column."""
    return number if number.startswith("<=") else f"   {number}"
