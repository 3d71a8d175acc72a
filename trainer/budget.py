"""`time_budget`: the number of steps that fits into so many minutes, decided once, before step 0.

Counted from the moment the process began to its end: imports, tokenizer, evaluations, samples and yardsticks included.
A few throw-away steps, two batches of scoring and one sample are timed. They leave nothing behind: the steps end in an
update that the optimizers are told to skip, and text is scored and drawn by a copy of the adapter that shares its
weights with the one that trains. The steps found become the run's `num_iterations` if they are fewer than it states.
"""

from __future__ import annotations

import bisect
import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adapters.base import Context
from configs.schema import STEPS, redacted
from data.yardsticks import expected_seconds
from trainer.clock import seconds_since_start
from trainer.evaluate import try_scoring
from trainer.memory import with_fewer_rows, work_of_all
from trainer.optim.optimizers import clip_gradients
from trainer.optim.schedules import require_room_for_warmup, schedule_factor
from trainer.precision import autocast
from trainer.sample import sample_text
from trainer.step import accumulate_gradients

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from data.rows import HeldoutRows
    from trainer.session import Session

__all__ = ["Costs", "decide", "decided_before"]

# What a run takes at least, where start and end alone use up its budget: fewer steps say nothing of a model.
FEWEST_STEPS = 10
LEAST_SHARE = 0.1  # of the budget, for training
WARM_UP = 2  # steps: the first one allocates and compiles, the second may compile again; nothing does eagerly on a CPU
TIMED = (2, 10)  # steps, at least and at most
TIMED_SHARE = 0.02  # of the budget: the most that steps beyond the least may take
LEAVING = 2.0  # seconds of writing the report and ending the process
BYTES_PER_SECOND = 200e6  # of a checkpoint, written, flushed and digested


@dataclass(frozen=True)
class Costs:
    """Seconds that a run takes. `spent`: since the process began; `interim`: an evaluation on the way with its sample;
    `end`: the evaluations after the last step, the sample, the checkpoint, the yardsticks and leaving."""

    spent: float
    step: float
    interim: float
    end: float
    every: int  # steps between evaluations, 0 = none on the way

    def total(self, steps: int) -> float:
        on_the_way = (steps - 1) // self.every if self.every else 0
        return self.spent + steps * self.step + on_the_way * self.interim + self.end

    def fitting(self, seconds: float, most: int) -> int:
        """The most steps, up to `most`, of a run that ends in time; 0 where none does."""
        return bisect.bisect_right(range(1, most + 1), seconds, key=self.total)


def decided_before(
    cfg: RunConfig, checkpoint: Mapping[str, Any] | None, begun: Mapping[str, Any]
) -> RunConfig:
    """The configuration with the number of steps that its run has been given already, where it has begun.

    Args:
        checkpoint: the generic fields that the checkpoint was trained with which the run goes on from.
        begun: those of the config.yaml in the run's folder, {} without one. Without a checkpoint the run starts over,
            if it is still the same.
    """
    if cfg.time_budget is None:
        return cfg
    then = begun if checkpoint is None else checkpoint
    if checkpoint is None and not (begun and begun.get("time_budget") is None and _same(cfg, begun)):
        return cfg
    return cfg.model_copy(update={**{name: then[name] for name in STEPS}, "time_budget": None})


# How long a run trains, how it was started and where it lies do not make it another.
_NOT_COMPARED = {*STEPS, "time_budget", "resume", "eval_only", "preset", "model_name", "output_dir"}


def _same(cfg: RunConfig, begun: Mapping[str, Any]) -> bool:
    return all(begun.get(k) == v for k, v in redacted(cfg).items() if k not in _NOT_COMPARED)


def decide(s: Session, should_stop: Callable[[], bool], note: Callable[[str], object]) -> str:
    """Give the session the number of steps that fits; says which and why. Nothing is decided where a stop was asked
    for meanwhile. Every process must call it. `note` hears of micro-batches that were too large."""
    minutes, stated = s.cfg.time_budget, s.total_steps
    assert minutes is not None

    def try_rows(rows: int) -> None:
        s.try_rows(rows)
        try_scoring(s.adapter, s.heldout(s.cfg.val_bytes_interim or s.cfg.val_bytes), s.precision, rows)

    costs = with_fewer_rows(s, note, lambda: measure(s, should_stop), try_rows)
    if s.world.agree(should_stop()):
        return "time_budget: nothing decided yet"
    fitting = costs.fitting(60 * minutes, stated)
    least = max(FEWEST_STEPS, int(LEAST_SHARE * 60 * minutes / costs.step))
    steps = max(fitting, min(least, stated))
    cut = {"num_iterations": steps, "num_epochs": None} if steps < stated else {}
    s.cfg = s.cfg.model_copy(update={**cut, "time_budget": None})
    s.last(steps)
    require_room_for_warmup(steps, s.cfg)
    return explanation(costs, minutes, steps, stated, kept=steps == fitting)


def explanation(costs: Costs, minutes: float, steps: int, stated: int, *, kept: bool) -> str:
    on_the_way = costs.total(steps) - costs.spent - steps * costs.step - costs.end
    why = (
        f"{costs.step:.2g} s a step, {costs.spent:.0f} s until here, "
        f"{on_the_way + costs.end:.0f} s for scores, samples and the end"
    )
    if not kept:
        takes = costs.total(steps) / 60
        return (
            f"time_budget: {minutes:.3g} minutes are not enough; {steps} steps take about {takes:.1f} ({why})"
        )
    if steps == stated:
        return f"time_budget: all {steps:,} steps fit into {minutes:.3g} minutes ({why})"
    return f"time_budget: {steps:,} of {stated:,} steps fit into {minutes:.3g} minutes ({why})"


def measure(s: Session, should_stop: Callable[[], bool]) -> Costs:
    """Of several processes the slowest counts."""
    on_gpu = [s.world.device] if s.world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu):
        step = _seconds_per_step(s, should_stop)
        interim, final, sample = _scoring_and_sample(s, should_stop)
    wait = expected_seconds(s.dataset, s.cfg.val_bytes) if _shares_its_cores(s) else 0.0
    end = interim * (2 if s.ema else 1) + final + sample + _saving(s) + wait + LEAVING
    spent, step, interim, end = s.world.maximum([seconds_since_start(), step, interim + sample, end])
    return Costs(spent, step, interim, end, s.cfg.val_loss_every)


def _seconds_per_step(s: Session, should_stop: Callable[[], bool]) -> float:
    """Of the stages of the run, those of its batches and those of its architecture, each by its part of it."""
    parts = s.loader.stages.parts(s.total_steps, s.adapter.cost_changes)
    return sum(part * _seconds_of(s, first, len(parts), should_stop) for first, part in parts)


def _seconds_of(s: Session, step: int, stages: int, should_stop: Callable[[], bool]) -> float:
    """Median of a few steps as training does this one, their batches prepared in the loader's thread."""
    allowed = TIMED_SHARE * 60 * (s.cfg.time_budget or 0.0) / stages
    warm_up = WARM_UP if s.compiled or s.world.device.type != "cpu" else 1
    seconds: list[float] = []
    started = time.perf_counter()
    s.adapter.train()
    for batch in s.loader.like(step).steps(0, warm_up + TIMED[1], of_draws="mean"):
        names = sorted(batch.denominators)
        everywhere = s.world.add_up([batch.denominators[n] for n in names])
        _throw_away_step(s, batch, dict(zip(names, everywhere, strict=True)))
        seconds.append(time.perf_counter() - started)
        started += seconds[-1]
        enough = len(seconds) >= warm_up + TIMED[0] and sum(seconds[warm_up:]) > allowed
        if s.world.agree(enough or should_stop()):
            break
    return statistics.median(seconds[warm_up:] or seconds)


def _throw_away_step(s: Session, batch: Any, denominators: dict[str, float]) -> None:
    """Everything that a step costs, but for hooks of the adapter; the update is skipped as after an overflow."""
    accumulate_gradients(s, batch, denominators, s.total_steps)
    clip_gradients(s.parameters, s.cfg.max_grad_norm)
    skipped = torch.ones((), device=s.world.device)
    s.optimizers.step(schedule_factor(0, s.total_steps, s.cfg), skipped)
    s.optimizers.zero_grad()
    if s.ema:
        s.ema.update(skipped)
    _wait_for(s.world.device)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _scoring_and_sample(s: Session, should_stop: Callable[[], bool]) -> tuple[float, float, float]:
    """Seconds of an interim evaluation, of the final one where it reads other text, and of a sample."""
    shared = [*s.adapter.parameters(), s.adapter.tokenizer, s.world]
    scorer = copy.deepcopy(s.adapter, {id(thing): thing for thing in shared}).eval()
    interim = s.heldout(s.cfg.val_bytes_interim or s.cfg.val_bytes)
    with torch.compiler.set_stance("force_eager"):
        per_target = _seconds_per_target(s, scorer, interim)
        sample = 0.0
        if s.cfg.sample_tokens and s.world.is_main:
            started = time.perf_counter()
            sample_text(replace(s, adapter=scorer, ema=None), should_stop)
            sample = time.perf_counter() - started
    again = s.cfg.val_bytes_interim not in (None, s.cfg.val_bytes)
    final = s.heldout(s.cfg.val_bytes).n_targets if again else 0
    return per_target * interim.n_targets, per_target * final, sample


@torch.no_grad()
def _seconds_per_target(s: Session, scorer: Any, rows: HeldoutRows) -> float:
    """From the second of two batches; every process scores its share."""
    ids = np.arange(min(s.plan.micro_rows, rows.n_rows))
    ctx = Context(seed=s.cfg.seed, step=0, phase="eval", rows_in_step=rows.n_rows)

    def score() -> None:
        with autocast(s.precision, s.world.device):
            scorer.likelihood(batch, ctx)
        _wait_for(s.world.device)

    for _ in range(2):
        started = time.perf_counter()
        batch = rows.batch(ids)
        work_of_all(s.world, score)
        seconds = time.perf_counter() - started
    return seconds / float(batch.weights.sum() + batch.end_weights.sum()) / s.world.size


def _saving(s: Session) -> float:
    """Seconds of all checkpoints: weights, optimizer state, average."""
    cfg = s.cfg
    if not cfg.save_checkpoint:
        return 0.0
    weights = sum(p.nbytes for p in s.adapter.parameters())
    bytes_ = weights * (2 if s.ema else 1) + s.optimizers.state_bytes()
    by_time = int((cfg.time_budget or 0) / cfg.save_minutes) if cfg.save_minutes else 0
    return (1 + by_time) * bytes_ / BYTES_PER_SECOND


def _shares_its_cores(s: Session) -> bool:
    """Whether the yardsticks' process takes its time from training: a step waits for its slowest core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return s.world.device.type == "cpu" and torch.get_num_threads() * s.world.size >= cores
