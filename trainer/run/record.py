"""What a run leaves behind. The loop tells the record on every process; what is spread over them is gathered here, and
process 0 alone writes it: to its folder, and to every sink."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from configs import trust
from configs.grammar import word
from data.yardsticks import NAMES, start_background
from naming import command_line
from trainer.annotate import annotation_of
from trainer.bench.documents import FILE as DOCUMENTS
from trainer.errors import sentence
from trainer.run.facts import checkpoint_contents, execution, facts_of, kernels_of, summary_of
from trainer.run.files import beside
from trainer.run.folder import RunFolder
from trainer.run.lines import evaluation_line, raw_evaluation_line, training_line
from trainer.run.manifest import anonymous_memory_bytes, peak_memory_bytes
from trainer.run.progress import Progress
from trainer.run.sinks import ConsoleSink, MetricsSink, Sink
from trainer.run.trackers import chosen_trackers
from trainer.view.console import Console
from trainer.view.report import write_report

if TYPE_CHECKING:
    from torch import Tensor

    from configs.schema import RunConfig
    from trainer.bench.documents import PerDocument
    from trainer.distributed import World
    from trainer.evaluate import Score
    from trainer.meter import Meter
    from trainer.sample import Sample
    from trainer.session import Session

__all__ = ["RunRecord"]


class RunRecord:
    """Use as a context manager, around everything that writes to the folder."""

    def __init__(
        self, path: Path, world: World, config_text: Callable[[RunConfig], str] | None = None
    ) -> None:
        """`config_text` makes the folder's config.yaml."""
        self.world, self._config_text = world, config_text
        self.folder = RunFolder(path)
        self.console = Console(enabled=world.is_main)
        self._sinks: list[Sink] = []  # from `begin` on, on process 0
        self._manifest: dict[str, Any] = {}
        self._yardsticks: Any = None
        self._trust: list[str] = []  # of a command that goes on with the run
        self._started = time.monotonic()
        self._earlier_seconds = 0.0  # of earlier lives of the run
        self._generation_speed: float | None = None  # tokens a second, of the fastest text of this life

    def __enter__(self) -> RunRecord:
        self.world.on_main(self.folder.lock)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.console.close()
        for sink in self._sinks:
            sink.close()
        if self._yardsticks is not None:
            self._yardsticks.close()
        if self.world.is_main:
            self.folder.unlock(failed=error is not None or not self._sinks)

    def make_way(self) -> None:
        """Of a run that goes on: have nothing stand where its files are written."""
        for told in self.world.on_main(self.folder.make_way):
            self.console.note(told)

    def begin(self, s: Session, progress: Progress) -> None:
        if not self.world.is_main:
            return
        self._earlier_seconds = progress.seconds_total
        facts = facts_of(s, self.folder.path, progress.step)
        if told := self.folder.drop_later(progress.step, scored=progress.evaluated_at == progress.step):
            self.console.note(told)
        if self._config_text:
            self.folder.write("config.yaml", self._config_text(s.cfg))
        if progress.step:
            for told in self._other_kernels(facts.manifest["kernels"]):
                self.console.note(told)
        self._manifest = facts.manifest
        self._trust = trust.words(s.cfg.type, s.cfg.model_adapter)
        self.folder.write_json("manifest.json", facts.manifest)
        # The file first: what the others show is in it.
        self._sinks = [MetricsSink(), ConsoleSink(self.console, self.folder)]
        self._sinks += chosen_trackers(s.cfg, self.console.note)
        for sink in self._sinks:
            sink.begin(facts)
        # What answers score, given the rest of their chats, compares with no score of text.
        if s.dataset.chats:
            return
        try:
            self._yardsticks = start_background(
                s.dataset, s.cfg.val_bytes, beside(self.folder.path / "yardsticks")
            )
        except OSError as error:
            self.console.warn(f"no yardsticks: {error}")

    def _other_kernels(self, kernels: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Operations that an earlier life of the run computed otherwise: numbers are then rounded otherwise, too."""
        try:
            earlier = self.folder.read_json("manifest.json").get("kernels")
        except (OSError, ValueError):
            return []
        if not isinstance(earlier, dict) or not all(isinstance(chosen, dict) for chosen in earlier.values()):
            return []
        return [
            f"{op} is computed by {name} from here on, by {' and '.join(earlier[op])} before ({why})"
            for op, chosen in kernels.items()
            for name, why in chosen.items()
            if earlier.get(op) and name not in earlier[op]
        ]

    def step(
        self, s: Session, progress: Progress, meter: Meter, grad_norm: Tensor, rates: dict[str, float]
    ) -> None:
        """Training since the last such line; empties the meter. `rates`: learning rate by role."""
        line = training_line(s, progress, meter, grad_norm.item(), rates)
        for sink in self._sinks:
            sink.step(line)

    def evaluation(self, progress: Progress, meter: Meter, score: Score) -> None:
        flops = progress.flops + meter.flops(self.world)  # takes part on every process
        self._evaluation(evaluation_line(progress, score, flops))

    def raw_evaluation(self, progress: Progress, score: Score) -> None:
        """The score of the weights as they are, beside that of their average."""
        self._evaluation(raw_evaluation_line(progress, score))

    def _evaluation(self, line: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.evaluation(line)

    def save(
        self,
        s: Session,
        progress: Progress,
        meter: Meter,
        *,
        best: bool,
        documents: PerDocument | None = None,
    ) -> None:
        """Write a checkpoint; `best`: it is also best_model/, and `documents` what each document was scored with it."""
        unread = meter.state_dict(self.world)  # takes part on every process

        def write() -> None:
            self._take_stock(s, progress)
            tensors, texts = checkpoint_contents(s, progress, unread)
            told = {DOCUMENTS: documents.content(progress.step)} if documents else {}
            self.folder.save(
                progress.step, tensors, {**texts, **told}, best=best, keep=s.cfg.save_total_limit
            )
            self._correct_manifest(s)

        self.world.on_main(write)

    def _take_stock(self, s: Session, progress: Progress) -> None:
        """What only this process knows of the whole run."""
        progress.seconds_total = self._earlier_seconds + time.monotonic() - self._started
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak_memory_bytes(s.world.device))
        progress.anonymous_memory_bytes = max(progress.anonymous_memory_bytes, anonymous_memory_bytes())

    def _correct_manifest(self, s: Session) -> None:
        """It was written before the first step; by now operations have run, and micro-batches may be smaller."""
        now = {"kernels": kernels_of(s), "execution": execution(s)}
        if any(self._manifest[key] != value for key, value in now.items()):
            self._manifest |= now
            self.folder.write_json("manifest.json", self._manifest)

    def _annotate(self, s: Session) -> None:
        """Of the weights that were scored; what an earlier life found is of others."""
        with s.averaged_weights():
            found = annotation_of(
                s.adapter, s.dataset.heldout, s.cfg.val_seq_len or s.cfg.train_seq_len, s.precision
            )
        if found:
            self.folder.write("annotation.json", json.dumps(found, separators=(",", ":")) + "\n")
        else:
            (self.folder.path / "annotation.json").unlink(missing_ok=True)

    def _optional(self, what: str, make: Callable[[], object]) -> None:
        """What only shows what is there already costs nobody a finished run, whatever goes wrong in it."""
        try:
            make()
        except Exception as error:
            self.console.warn(f"no new {what}: {sentence(error)}")

    def summary(self) -> dict[str, Any]:
        """summary.json, on every process; {} where no life of the run came to its end."""
        return self.world.on_main(lambda: self.folder.read_summary(self.console.note))

    def complete(self, step: int, final: bool = True) -> None:
        """Make of the results what is made of them; a life may have been cut short before it was. `final`: also
        final_model/."""
        if not self.world.is_main:
            return
        if final and self.folder.has_checkpoint(step):
            self._optional("final_model", lambda: self.folder.link_final(step))
        self._optional("report.html", lambda: write_report(self.folder.path))

    def sample(self, step: int, drawn: Sample) -> None:
        """Of process 0 alone. The first text of a process also waits for what is made once."""
        self.folder.add_sample(step, drawn.text)
        self._generation_speed = max(self._generation_speed or 0.0, drawn.tokens / drawn.seconds)

    def stopped(self, step: int, signal_name: str, saved: bool) -> None:
        kept = f"saved step {step}" if saved and step else "nothing was saved"
        self.console.note(f"{signal_name or 'stop'} received: {kept}")
        if saved and step:
            self.console.note(f"go on with: {command_line(word('resume', self.folder.path), *self._trust)}")

    def _read_yardsticks(self, should_stop: Callable[[], bool]) -> dict[str, float]:
        """Bits per byte by name; nothing where there are none, or nobody wants to wait for them."""
        if self._yardsticks is None:
            return {}
        with self.console.doing("waiting for the yardsticks (Ctrl-C leaves them out)"):
            while not self._yardsticks.done() and not should_stop():
                time.sleep(0.02)
        try:
            if self._yardsticks.done():
                found = self._yardsticks.result()
                if missing := [name for name in NAMES if name not in found]:
                    self.console.note(f"no {' and '.join(missing)}: this Python was built without")
                return found
            self.console.warn("the yardsticks were not waited for")
        except RuntimeError as error:
            self.console.warn(f"no yardsticks: {error}")
        return {}

    def finish(
        self,
        s: Session,
        progress: Progress,
        meter: Meter,
        score: Score,
        best: dict[str, Any],
        documents: PerDocument | None,
        *,
        stopped_early: bool,
        should_stop: Callable[[], bool],
    ) -> None:
        """The score stands: what is still to come is made as far as it can be. `best`: step and score of best_model/,
        {} where the run keeps none. `documents`: of the score that counts; None for those that best_model/ has."""
        flops = progress.flops + meter.flops(self.world)  # takes part on every process
        if not self.world.is_main:
            return
        yardsticks = self._read_yardsticks(should_stop)
        if s.dataset.entropy_bits_per_byte is not None:
            yardsticks["true entropy"] = s.dataset.entropy_bits_per_byte
        self._take_stock(s, progress)
        summary = summary_of(
            s, progress, flops, score, yardsticks, best, stopped_early, self._generation_speed
        )
        step = best["step"] if best else progress.step
        self.folder.keep_documents(documents.content(step) if documents else None)
        # Before the summary: a life that finds one makes of a run only what can be made without its model.
        self._optional("manifest.json", lambda: self._correct_manifest(s))
        self._optional("annotation.json", lambda: self._annotate(s))
        self.folder.write_json("summary.json", summary)
        self.complete(progress.step, final=not s.cfg.eval_only)
        for sink in self._sinks:
            sink.finish(summary)
