"""Who keeps a record of a run, on process 0: metrics.jsonl, the console, and what trackers.py has."""

from __future__ import annotations

from typing import Any, Protocol

from configs import trust
from configs.grammar import word
from data.config import CHATS
from naming import command_line
from trainer.run.facts import Facts
from trainer.run.folder import RunFolder
from trainer.run.metrics import MetricsWriter
from trainer.view.console import Console
from trainer.view.format import bits_per_byte

__all__ = ["ConsoleSink", "MetricsSink", "Sink"]


class Sink(Protocol):
    """Told everything a run says, in this order: `begin` once, then lines, `finish` if the run came to its end, `close`
    in any case. A line is a mapping with a `step`; a resumed run begins with the lines after `facts.step`."""

    def begin(self, facts: Facts) -> None: ...

    def step(self, line: dict[str, Any]) -> None:
        """Training since the last such line (`trainer.run.lines.training_line`)."""

    def evaluation(self, line: dict[str, Any]) -> None:
        """A score: values called `val_<name>`."""

    def finish(self, summary: dict[str, Any]) -> None:
        """What stands in summary.json, which is written by now, as is report.html."""

    def close(self) -> None: ...


class MetricsSink:
    """metrics.jsonl."""

    def begin(self, facts: Facts) -> None:
        self._writer = MetricsWriter(facts.path)

    def step(self, line: dict[str, Any]) -> None:
        self._writer.write(line)

    def evaluation(self, line: dict[str, Any]) -> None:
        self._writer.write(line)

    def finish(self, summary: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class ConsoleSink:
    """Standard output."""

    def __init__(self, console: Console, folder: RunFolder) -> None:
        self._console, self._folder = console, folder

    def begin(self, facts: Facts) -> None:
        for text in facts.notes:
            self._console.note(text)
        self._console.banner(facts.banner)
        self._metrics = facts.console_metrics
        self._named = facts.config["type"], facts.config["model_adapter"]
        self._epochs: float | None = facts.config["num_epochs"]
        self._prompt = "hello" if facts.config["training_mode"] == CHATS else "def "

    def step(self, line: dict[str, Any]) -> None:
        self._console.step(line, self._metrics)

    def evaluation(self, line: dict[str, Any]) -> None:
        if "val_raw_bits_per_byte" in line:
            raw = bits_per_byte(line, "val_raw_")
            self._console.note(f"without averaging the weights: {raw} bits/byte")
        else:
            self._console.evaluation(line)

    def finish(self, summary: dict[str, Any]) -> None:
        self._console.score_table(summary["score"], summary["yardsticks"], summary.get("best"))
        if sample := self._folder.last_sample():
            self._console.sample(sample)
        path, steps = self._folder.path, summary["steps"]
        if summary["stopped_early"]:
            longer = "early_stopping=false"
        elif self._epochs:
            longer = f"num_epochs={2 * self._epochs:g}"
        else:
            longer = f"num_iterations={2 * max(steps, 1)}"
        commands = [
            command_line(
                "generate", "--checkpoint", path, "--prompt", self._prompt, *trust.option(*self._named)
            ),
            command_line(word("resume", path), longer, *trust.words(*self._named)),
        ]
        self._console.finish(path, commands if self._folder.has_checkpoint(steps) else [])

    def close(self) -> None:
        self._console.close()
