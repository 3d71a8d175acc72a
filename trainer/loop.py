"""THE training loop: every architecture goes through this one.

    for each step:
        agree on denominators and stop/save flags      one small host all-reduce; and whether all could read their rows
        for each micro-batch: forward, backward        gradients exchanged in the last one only
        agree that all had the memory for it           the step begun again with fewer rows at a time where not
        finite check, clip, optimizers, after_step, constrain, EMA
        log, evaluate, checkpoint when due

Nothing here knows an architecture. The step itself never waits for the device: the flag that says whether a step's
gradients were finite is read one step later, and until then every update after it is a no-op too.

Words that have one meaning, here and in data/, adapters/ and kernels/:

    row      one sequence of a batch, known by its global id: a context token and the targets that are scored together.
             A row of logits is one position of it
    visit    the turn at which a row of training text is read in its epoch, 0, 1, 2, ...
    place    an index along a text: where in the epoch's stream a visit reads
    window   the stretch of text that the network sees at once; longer text is scored or written in several
    draw     what comes of random numbers, a function of (seed, step, row): a token, the noise of a row, one estimate
             of its bound
    choice   what a run picks from a table of names, once for the whole run: optimizer, schedule, kernel, tokenizer
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs import trust
from configs.grammar import word
from data.errors import DataError
from naming import command_line, shorten
from trainer.batching import StepBatch
from trainer.budget import decide, decided_before
from trainer.diagnose import explain_non_finite, non_finite
from trainer.distributed import World, open_world
from trainer.errors import StopRequested, TrainingError, sentence
from trainer.evaluate import Score, evaluate, try_scoring
from trainer.fetch import Fetched
from trainer.memory import NoRoom, begin_again, with_fewer_rows
from trainer.meter import Meter
from trainer.optim.optimizers import clip_gradients
from trainer.optim.schedules import jump, momentum_at, schedule_factor
from trainer.optim.stages import common_rows, stages_of
from trainer.run.adapting import source_of
from trainer.run.checkpoint import (
    NotAsWritten,
    as_written,
    load_json,
    load_named_tensors,
    load_tensors,
    newest_checkpoint,
)
from trainer.run.folder import BEST
from trainer.run.lines import refuse_taken_names, refuse_taken_names_of_score
from trainer.run.progress import Progress
from trainer.run.record import RunRecord
from trainer.run.restore import load_average, weights_of
from trainer.run.resume import (
    check_resumable,
    checkpoint_to_resume,
    go_on_mixing,
    load_optimizers,
    require_same_tokenizer,
    scores_alike,
    start_from_weights,
    tokenizer_to_take,
)
from trainer.run.source import Checkpoint, Source, load_weights
from trainer.sample import sample_text
from trainer.session import Session, open_session, total_steps
from trainer.signals import StopSignal
from trainer.step import accumulate_gradients, dropout_seed

if TYPE_CHECKING:
    from adapters.base import StepOutput
    from configs.schema import ModelConfig, RunConfig
    from trainer.bench.documents import PerDocument

__all__ = ["train"]


def train(
    cfg: RunConfig,
    model_cfg: ModelConfig,
    run_dir: Path,
    config_text: Callable[[RunConfig], str] | None = None,
) -> float:
    """Train, score and sample; returns bits per byte (of the best model if `save_best_model`), NaN if stopped
    before the first score. `config_text` makes the config.yaml of the run folder, the text that reproduces the run.

    Raises SystemExit (128 + the number of the signal) where a stop was asked for and nothing could be saved."""
    with (
        StopSignal("saving, then leaving") as stop,
        open_world(cfg) as world,
        RunRecord(run_dir, world, config_text) as record,
    ):
        try:
            # Of several processes only the one that the others wait for: see `interruptible`.
            leaving = stop.at_once() if world.size == 1 else nullcontext()
            with record.console.doing("reading the text") as tell, leaving:
                trainer = _trainer(cfg, model_cfg, world, record, stop, tell)
            if world.agree(stop.requested):
                raise StopRequested
            return trainer.run()
        except StopRequested:
            record.stopped(0, stop.name, saved=False)
    raise SystemExit(stop.status)  # out here, where the other processes have been taken leave of


def _trainer(
    cfg: RunConfig,
    model_cfg: ModelConfig,
    world: World,
    record: RunRecord,
    stop: StopSignal,
    tell: Callable[[str], object],
) -> Trainer:
    """A trainer before its first step, or where a checkpoint goes on. `tell`: what is being done."""
    first: NotAsWritten | None = None  # of what was wrong with checkpoints, where another can be gone on with
    while True:
        try:
            checkpoint = world.on_main(lambda: checkpoint_to_resume(cfg, record.folder, record.console.warn))
        except ValueError:
            if first is None:
                raise
            raise first from None
        try:
            return _trainer_at(checkpoint, cfg, model_cfg, world, record, stop, tell)
        except NotAsWritten as error:
            if checkpoint is None:
                raise
            record.folder.pass_over(checkpoint, str(error))
            first = first or error.with_traceback(None)  # which holds all of the trainer


def _trainer_at(
    checkpoint: Path | None,
    cfg: RunConfig,
    model_cfg: ModelConfig,
    world: World,
    record: RunRecord,
    stop: StopSignal,
    tell: Callable[[str], object],
) -> Trainer:
    """The same where it is known which checkpoint. NotAsWritten, on all processes, where its content is other than was
    saved."""
    console = record.console
    if checkpoint:
        record.make_way()
    saved = load_json(checkpoint, "training_state.json") if checkpoint else {}
    begun = world.on_main(record.folder.read_config)
    if (decided := decided_before(cfg, saved.get("training_config"), begun)) is not cfg:
        cfg = decided
        console.note("time_budget: the number of steps stays as it was decided when the run began")
    if checkpoint:  # what a run began from belongs to it, though going on does not read it
        began_from = saved["training_config"].get("init_from_checkpoint")
        cfg = cfg.model_copy(update={"init_from_checkpoint": began_from})
    source: Source | None = Checkpoint(checkpoint) if checkpoint else None
    if source is None and cfg.init_from_checkpoint:
        source = source_of(cfg, model_cfg, console.warn)
    tokenizer = tokenizer_to_take(cfg, source) if source else None
    micro_rows = val_rows = None
    if checkpoint:
        recorded, share = saved["execution"], common_rows(cfg) // world.size
        if recorded["world_size"] == world.size and share % recorded["micro_rows"] == 0:
            micro_rows = recorded["micro_rows"]
            val_rows = saved.get("val_rows", micro_rows)
    session = open_session(
        cfg,
        model_cfg,
        world,
        micro_rows=micro_rows,
        val_rows=val_rows,
        tokenizer=tokenizer,
        accept=partial(require_same_tokenizer, cfg, source) if source else None,
        interruptible=stop.at_once,
        tell=tell,
    )
    if cfg.time_budget is not None and not cfg.eval_only:
        tell("timing a few steps")
        console.note(decide(session, lambda: stop.requested, console.note))
    trainer = Trainer(session, record, stop)
    if checkpoint:
        trainer.resume(checkpoint, saved)
    elif source:
        start_from_weights(session, source, console)
    return trainer


class Trainer:
    """The state of a running training and the few things that can happen to it."""

    def __init__(self, session: Session, record: RunRecord, stop: StopSignal) -> None:
        self.s, self.cfg, self.world = session, session.cfg, session.world
        self.record, self.console, self.stop = record, record.console, stop
        self.progress = Progress()
        self.meter = Meter(self.world.device)
        self.total = session.total_steps
        self.planned_flops = session.adapter.cost(self.cfg.train_seq_len).training_per_token  # of a token
        self.last_norm: Tensor = torch.zeros((), device=self.world.device)
        # 1.0 from the first non-finite step on; keeps later updates from building on it until the host has seen it.
        self.halted = torch.zeros((), device=self.world.device)
        self.unread_flag: tuple[int, Fetched] | None = None
        self.denominators: list[str] | None = None  # their names, from the first step of this life on
        self.unreadable = ""  # why this process cannot read the text of the next step
        self.last_save = time.monotonic()
        self.latest: Score | None = None  # of the most recent evaluation of this life
        self.interim_rows = session.heldout(self.cfg.val_bytes_interim or self.cfg.val_bytes)

    # -- the run -------------------------------------------------------------------------------------------

    def run(self) -> float:
        """Raises TrainingError, with all that was trained saved, where text can no longer be read."""
        try:
            return self._run()
        except DataError as error:  # on every process alike
            if self.cfg.save_checkpoint and self.progress.step > 0:
                self._save()
            kept = "Nothing was saved"
            if newest := newest_checkpoint(self.record.folder.path, self.console.warn):
                go_on = command_line(
                    word("resume", self.record.folder.path),
                    *trust.words(self.cfg.type, self.cfg.model_adapter),
                )
                kept = f"The last complete checkpoint is {newest}. Go on with: {go_on}"
            raise TrainingError(f"stopped at step {self.progress.step}: {error}. {kept}") from error

    def _run(self) -> float:
        if (ended := self._ended()) is not None:
            return ended
        self.record.begin(self.s, self.progress)
        if self.cfg.eval_only:
            score = self._final_score()
            if score:
                self.record.evaluation(self.progress, self.meter, score)
                self._sample()
            return self._finish(score) if score else self._leave()
        if not (self._evaluate() if self._evaluation_due() else self._make_up_sample()):
            return self._leave()
        self.s.adapter.train()
        begin = self.progress.step
        for batch in self._batches(begin if self._out_of_patience() else self.total):
            started = time.perf_counter()
            before = replace(self.progress), self.meter.copy()
            denominators, stop, save = self._agree(batch)
            if stop:
                return self._leave()
            assert batch is not None
            compiles = self.s.compiled and batch.step == begin
            told = ""
            try:
                with self.console.doing("compiling") if compiles else nullcontext():
                    self._train_step(batch, denominators)
            except NoRoom as error:
                told = str(error)
            if told:
                self.progress, self.meter = before
                begin_again(self.s, told, partial(self._tell, f"step {batch.step}"))
                continue
            if batch.step in self.s.loader.stages.ends[:-1]:
                self.console.note(f"step {batch.step}: {self._of_stage(batch.step)}")
            self.progress.seconds += time.perf_counter() - started
            if self.progress.step % self.cfg.logging_steps == 0 or self.progress.step == self.total:
                self._log()
            if self._evaluation_due() and not self._evaluate():
                return self._leave()
            if save or self._save_step_due():
                self._save()
            if self._out_of_patience():
                self.console.note(
                    f"early stopping: no improvement in {self.cfg.early_stopping_patience} evaluations; best was "
                    f"{self.progress.best_bits_per_byte:.4f} bits per byte at step {self.progress.best_step}"
                )
                break
        self._require_finite()
        score = self._final_score()
        return self._finish(score) if score else self._leave()

    def _batches(self, end: int) -> Iterator[StepBatch | None]:
        """Those of the steps from here to `end`; of a step that has begun again, another one. None, at last, where the
        text of a step cannot be read by this process."""
        while self.progress.step < end:
            plan = self.s.plan
            with closing(self.s.loader.steps(self.progress.step, end)) as batches:
                try:
                    for batch in batches:
                        yield batch
                        if self.s.plan is not plan:
                            break
                except DataError as error:
                    self.unreadable = str(error)
                    yield None
                    return

    def _tell(self, where: str, what: str) -> None:
        self.console.note(f"{where}: {what}")

    def _ended(self) -> float | None:
        """The score of a run that was scored to its end and has no step left, having said how to go on."""
        p, cfg, summary = self.progress, self.cfg, self.record.summary()
        step, waited = summary.get("steps", -1), summary.get("evaluations_without_improvement")
        # With save_only_best the last checkpoint lies before the end.
        here = step == p.step or (cfg.save_only_best and step > p.step > 0)
        if cfg.eval_only or not here or (step < self.total and not self._out_of_patience(waited)):
            return None
        if step < self.total:
            told = f"the run stopped early, at step {step}. Set early_stopping=false or raise early_stopping_patience"
        else:
            length = "num_iterations" if cfg.num_epochs is None else "num_epochs"
            told = f"step {step} >= {length} {getattr(cfg, length)}. Raise {length} to go on"
        self.console.note(f"nothing to do: {told}")
        self.record.complete(step)
        return summary.get("best", summary["score"])["bits_per_byte"]

    def _save_step_due(self) -> bool:
        cfg = self.cfg
        if cfg.save_steps is None or not cfg.save_checkpoint or cfg.save_only_best:
            return False
        return self.progress.step % cfg.save_steps == 0

    def _agree(self, batch: StepBatch | None) -> tuple[dict[str, float], bool, bool]:
        """(global denominators, anyone asked to stop, rank 0's clock says save), in one exchange.

        Raises:
            DataError: some process has no batch, as it cannot read the text of the step.
        """
        if self.denominators is None:  # before the first step nobody without a batch knows their names
            self._require_text(self.world.agree(batch is None))
            assert batch is not None
            self.denominators = sorted(batch.denominators)
        cfg = self.cfg
        due = cfg.save_checkpoint and not cfg.save_only_best and cfg.save_minutes is not None
        due = due and time.monotonic() - self.last_save >= 60 * (cfg.save_minutes or math.inf)
        vector = [0.0] * (len(self.denominators) + 2)
        if batch:
            vector = [*(batch.denominators[n] for n in self.denominators), batch.tokens, batch.bytes]
        vector += [float(self.stop.requested), float(due and self.world.is_main), float(batch is None)]
        *values, tokens, bytes_, stop, save, unreadable = self.world.add_up(vector)
        self._require_text(unreadable > 0)
        denominators = dict(zip(self.denominators, values, strict=True))
        if not stop:
            self.meter.add_step(denominators, tokens, bytes_)
            self.progress.tokens += int(tokens)
            self.progress.bytes += int(bytes_)
        return denominators, stop > 0, save > 0

    def _require_text(self, unreadable: bool) -> None:
        """DataError on every process if it is on any that the text cannot be read: what the first of them was told."""
        if unreadable:
            raise DataError(next(filter(None, self.world.gather(self.unreadable))))

    # -- one step --------------------------------------------------------------------------------------------

    def _train_step(self, batch: StepBatch, denominators: dict[str, float]) -> None:
        s, step = self.s, batch.step
        bad_loss = accumulate_gradients(s, batch, denominators, self.total, self._take_note)
        self.last_norm = clip_gradients(s.parameters, self.cfg.max_grad_norm)
        found_inf = self.world.any_on_device((~torch.isfinite(self.last_norm) | bad_loss).float())
        if not s.scaler.enabled:
            found_inf = self.halted = torch.maximum(self.halted, found_inf)
        momentum = momentum_at(step, self.total, self.cfg)
        s.optimizers.step(schedule_factor(step, self.total, self.cfg), found_inf, momentum)
        s.optimizers.zero_grad()
        s.scaler.update(found_inf)
        s.adapter.end_step(step, found_inf)
        if s.ema:
            s.ema.update(found_inf)
        self.progress.step = step + 1
        self._raise_if_not_finite()
        self.unread_flag = (step, Fetched(found_inf))

    def _take_note(self, output: StepOutput) -> None:
        """Of one micro-batch of a step."""
        refuse_taken_names(self.s.adapter, output)
        if output.flops is not None:
            output.flops = self.s.adapter.realised(output.flops, self.cfg.train_seq_len)
        self.meter.add_output(output, self.planned_flops * self.s.plan.micro_rows * self.cfg.train_seq_len)

    def _raise_if_not_finite(self) -> None:
        """Read the flag of the step before last: by now the device is past it."""
        if self.unread_flag is None:
            return
        (step, flag), self.unread_flag = self.unread_flag, None
        if flag.item() == 0:
            return
        if self.s.scaler.enabled and self.s.scaler.scale.item() > 2.0**-14:
            self.progress.skipped_steps += 1
            return
        batch = self.s.loader.load(step)
        why = explain_non_finite(
            self.s.adapter,
            batch,
            self.s.precision,
            self.world.device,
            self.total,
            lambda i: torch.manual_seed(dropout_seed(self.cfg.seed, step, batch.first_rows[i])),
        )
        rates = ", ".join(f"{k} {v:.2e}" for k, v in self._learning_rates(step).items())
        newest = newest_checkpoint(self.record.folder.path, self.console.warn)
        kept = f"{newest} is untouched" if newest else "no checkpoint had been saved yet"
        raise TrainingError(
            f"step {step} is not finite: {why}. Learning rates: {rates}. Nothing of this step was kept; {kept}. "
            f"Try a lower learning rate, a longer warm-up or mixed_precision=no"
        )

    def _require_finite(self) -> None:
        """Before weights are scored or saved: TrainingError where some are not finite. An update can leave such of
        gradients that are, which the loss of the next step alone would show."""
        self._raise_if_not_finite()
        if not (names := non_finite(self.s.adapter)):
            return
        step = self.progress.step
        rates = ", ".join(f"{k} {v:.2e}" for k, v in self._learning_rates(step - 1).items())
        newest = newest_checkpoint(self.record.folder.path, self.console.warn)
        kept = f"{newest} is from before" if newest else "no checkpoint had been saved yet"
        raise TrainingError(
            f"the update of step {step - 1} left weights that are not finite: {shorten(names)}. Learning rates: "
            f"{rates}. They were not saved; {kept}. Try a lower learning rate, a longer warm-up or mixed_precision=no"
        )

    def _of_stage(self, step: int) -> str:
        stages = self.s.loader.stages
        rows, rate = stages.rows_at(step), stages.rate_at(step)
        return f"{rows} rows, {rows * self.cfg.train_seq_len:,} tokens a step from here, scheduled rates x {rate:g}"

    def _learning_rates(self, step: int) -> dict[str, float]:
        return self.s.optimizers.learning_rates(schedule_factor(step, self.total, self.cfg))

    # -- what happens now and then ----------------------------------------------------------------------------

    def _log(self) -> None:
        rates = self._learning_rates(self.progress.step - 1)
        self.record.step(self.s, self.progress, self.meter, self.last_norm, rates)

    def _evaluation_due(self) -> bool:
        step, every = self.progress.step, self.cfg.val_loss_every
        due = step >= self.total or (every > 0 and step > 0 and step % every == 0)
        return due and self.progress.evaluated_at != step

    def _score(self, rows: Any, averaged: bool = True) -> Score | None:
        """Of the averaged weights where there are some, unless told otherwise."""
        s = self.s

        # Eager, as in `eval`: the graphs of scoring are not those of training and are compiled anew in each process.
        # gpt2 at nano on one core, rows padded to four widths, 0.65 MB eager : compiled: 15.2 : 14.8 s in fp32, 9.5 :
        # 8.2 in bf16, after 2.6 and 6 CPU seconds of compilation; and what torch 2.13 makes of bf16 on a CPU without
        # gradients scores NaN.
        def once() -> Score | None:
            swap = s.averaged_weights() if averaged else nullcontext()
            with self.console.doing("scoring"), torch.compiler.set_stance("force_eager"), swap:
                return evaluate(
                    s.adapter,
                    rows,
                    self.world,
                    batch_rows=s.plan.micro_rows,
                    seed=self.cfg.seed,
                    precision=s.precision,
                    should_stop=lambda: self.stop.requested,
                )

        tell = partial(self._tell, f"scoring at step {self.progress.step}")
        score = with_fewer_rows(s, tell, once, partial(try_scoring, s.adapter, rows, s.precision))
        if score and not math.isfinite(score.bits_per_byte):
            raise TrainingError(f"the held-out score at step {self.progress.step} is {score.bits_per_byte}")
        if score:
            self._refuse_taken_names(score)
        return score

    def _refuse_taken_names(self, score: Score) -> None:
        """The names are known after the first evaluation only: what has been trained until then is kept."""
        try:
            refuse_taken_names_of_score(self.s.adapter, score)
        except ValueError:
            if self.cfg.save_checkpoint and self.progress.step > 0:
                self._save()
            raise

    def _make_up_sample(self) -> bool:
        """The text of an evaluation after which an earlier life was stopped. False when a stop was asked for again."""
        step = self.progress.step
        return step == 0 or self.progress.evaluated_at != step or self._sample()

    def _sample(self) -> bool:
        """Append a text to samples.txt, once per step. False when a stop was asked for meanwhile."""
        return not self.world.agree(self.world.is_main and not self._write_sample())

    def _write_sample(self) -> bool:
        step, folder = self.progress.step, self.record.folder
        if not self.cfg.sample_tokens or folder.sampled_at == step:
            return True
        try:
            eager = torch.compiler.set_stance("force_eager")
            with self.console.doing("writing a sample"), eager, self.s.averaged_weights():
                drawn = sample_text(self.s, lambda: self.stop.requested)
            if drawn is None:
                return False
            self.record.sample(step, drawn)
        except Exception as error:  # a text is to look at: no training ends for it, whatever its model does
            self.console.warn(f"no sample of step {step}: {sentence(error)}")
        return True

    def _evaluate(self) -> bool:
        """Score the held-out text and take note of it. False when a stop was asked for meanwhile."""
        self._require_finite()
        p, cfg = self.progress, self.cfg
        raw = None
        if self.s.ema and p.step >= self.total:  # once, to show what averaging does
            raw = self._score(self.interim_rows, averaged=False)
            if raw is None:
                return False
        score = self._score(self.interim_rows)
        if score is None:
            return False
        p.evaluated_at = p.step
        self.s.adapter.after_evaluation(p.step)
        if p.best_bits_per_byte - score.bits_per_byte > cfg.early_stopping_threshold:
            p.evaluations_without_improvement = 0
        else:
            p.evaluations_without_improvement += 1
        better = score.bits_per_byte < p.best_bits_per_byte
        if better:
            p.best_bits_per_byte, p.best_step = score.bits_per_byte, p.step
            p.best_standard_error = score.standard_error
        self.record.evaluation(p, self.meter, score)
        if raw:
            self.record.raw_evaluation(p, raw)
        sampled = self._sample()
        if better and (cfg.save_best_model or cfg.save_only_best):
            known = cfg.save_best_model and self._same_text
            self._save(best=cfg.save_best_model, documents=score.per_document if known else None)
        self.latest = score
        return sampled

    def _out_of_patience(self, waited: int | None = None) -> bool:
        """`waited`: evaluations without improvement, if not those of now."""
        waited = self.progress.evaluations_without_improvement if waited is None else waited
        return self.cfg.early_stopping and waited >= self.cfg.early_stopping_patience

    def _final_score(self) -> Score | None:
        """The score over `val_bytes`; the last interim evaluation if that covered the same text."""
        if self._same_text and self.latest and self.progress.evaluated_at == self.progress.step:
            return self.latest
        return self._score(self.s.heldout(self.cfg.val_bytes))

    @property
    def _same_text(self) -> bool:
        """Whether evaluations along the way cover the text of the final score."""
        return self.cfg.val_bytes_interim in (None, self.cfg.val_bytes)

    def _best(self, last: Score) -> tuple[dict[str, Any], PerDocument | None] | None:
        """Step and score of best_model/ on the text of the final score, {} where none is kept; and documents of the
        score that counts, None where best_model/ has them. None when a stop was asked for meanwhile."""
        p = self.progress
        if not self.cfg.save_best_model or p.best_step < 0:
            return {}, last.per_document
        if p.best_step == p.step:
            return {"step": p.step, **last.as_dict()}, last.per_document
        if self._same_text:
            found = {
                "step": p.best_step,
                "bits_per_byte": p.best_bits_per_byte,
                "kind": last.kind,
                "standard_error": p.best_standard_error,
            }
            return found, None
        with weights_of(self.s, self.record.folder.path / BEST):
            score = self._score(self.s.heldout(self.cfg.val_bytes))
        return None if score is None else ({"step": p.best_step, **score.as_dict()}, score.per_document)

    # -- saving, resuming, leaving -------------------------------------------------------------------------------

    def _save(self, best: bool = False, documents: PerDocument | None = None) -> None:
        self._require_finite()
        with self.console.doing("saving"):
            self.record.save(self.s, self.progress, self.meter, best=best, documents=documents)
        self.last_save = time.monotonic()

    def resume(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        s = self.s
        before = check_resumable(s, checkpoint, saved, self.console.note)
        wrong: NotAsWritten | None = None
        try:
            self._take(checkpoint, saved)
        except NotAsWritten as error:
            wrong = error
        if self.world.agree(wrong is not None):
            raise wrong or NotAsWritten(f"another process cannot read {checkpoint}")
        if s.ema and not (checkpoint / "ema.pt").is_file():
            self.console.note(
                f"{checkpoint.name} keeps no average of the weights: ema_decay begins one at its weights"
            )
        self.progress = Progress.from_json(saved["progress"], self.planned_flops)
        self._settle_best(checkpoint, scores_alike(before, self.cfg))
        if told := go_on_mixing(s.rows, saved):
            self.console.note(told)
        if told := jump(self.progress.step, (total_steps(before, s.rows), before), (self.total, self.cfg)):
            self.console.warn(told)
        was = stages_of(before, total_steps(before, s.rows)).rows_at(self.progress.step)
        if (rows := s.loader.stages.rows_at(self.progress.step)) != was:
            self.console.note(f"a step has {rows} rows from here, and would have had {was}")
        s.loader.start_at(self.progress.step, saved["position"])
        self.console.note(
            f"resumed {checkpoint.name} at step {self.progress.step}, after {self.progress.seconds:.0f} s of training"
        )

    def _take(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        """Weights, their average and the optimizers' state. NotAsWritten where one of them is not of this run."""
        s = self.s
        try:
            load_weights(s.adapter, load_named_tensors(checkpoint, "model.pt"), f"{checkpoint}/model.pt")
            if names := non_finite(s.adapter):
                raise NotAsWritten(f"{checkpoint} holds weights that are not finite: {shorten(names)}")
            state = load_tensors(checkpoint, saved["optimizer_file"])
            with as_written(checkpoint / saved["optimizer_file"]):
                load_optimizers(s, state["optimizers"], checkpoint)
                s.scaler.load_state_dict(state["scaler"])
                self.meter.load_state_dict(state["meter"], self.world)
            if s.ema:
                load_average(s.ema, checkpoint)
        except NotAsWritten:
            raise
        except ValueError as error:
            raise NotAsWritten(str(error)) from error

    def _settle_best(self, checkpoint: Path, scores_alike: bool) -> None:
        """The best score is gone on with where it is one of the same text and, if best_model/ is kept, its model is."""
        p, folder = self.progress, self.record.folder
        if p.best_step < 0:
            return
        if not scores_alike:
            why = "evaluations score other text, or other weights, than before"
        elif self.cfg.save_best_model and not self.world.on_main(
            lambda: folder.have_best(p.best_step, checkpoint)
        ):
            why = f"the model of step {p.best_step} is no longer there"
        else:
            return
        self.console.note(
            f"the best score so far, {p.best_bits_per_byte:.4f} at step {p.best_step}, is forgotten: {why}"
        )
        p.best_bits_per_byte, p.best_step, p.evaluations_without_improvement = math.inf, -1, 0

    def _leave(self) -> float:
        """A stop was asked for: save, say how to go on, end well. Raises StopRequested where nothing can be saved."""
        if not self.cfg.save_checkpoint or self.progress.step == 0:
            raise StopRequested
        self._save()
        self.record.stopped(self.progress.step, self.stop.name, saved=True)
        return self.progress.best_bits_per_byte if self.progress.best_step >= 0 else math.nan

    def _finish(self, score: Score) -> float:
        if not self.cfg.eval_only and self.cfg.save_checkpoint and not self.cfg.save_only_best:
            self._save()
        found = self._best(score)
        if found is None:
            return self._leave()
        best, documents = found
        early = self.progress.step < self.total and not self.cfg.eval_only
        self.record.finish(
            self.s,
            self.progress,
            self.meter,
            score,
            best,
            documents,
            stopped_early=early,
            should_stop=lambda: self.stop.requested,
        )
        return best["bits_per_byte"] if best else score.bits_per_byte
