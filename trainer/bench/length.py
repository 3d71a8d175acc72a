"""`budget`: the length of a run that meets a target: its steps, then the rows of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from configs.hardware import world_size
from configs.messages import ConfigError
from trainer.bench.counting import unbuilt
from trainer.bench.targets import refuse_given, remark, target_met
from trainer.bench.text import text_or_vocabulary
from trainer.optim.stages import stages_of, steps_of_rows

if TYPE_CHECKING:
    from configs.schema import ModelConfig, RunConfig

__all__ = ["LENGTH", "fit_length"]

LENGTH = ("num_iterations", "num_epochs", "global_batch_size", "time_budget")  # what a budget decides
OF_BATCH = ("batch_size", "gradient_accumulation_steps")  # which together say global_batch_size


def fit_length(cfg: RunConfig, model_cfg: ModelConfig, explicit: set[str], notices: list[str]) -> RunConfig:
    """`notices` hears what was found. ConfigError where `explicit` fields, those of the command line, are among those
    that the target decides."""
    quantity_, target = next(iter(cfg.budget.given.items()))
    given = sorted(name for name in explicit & set(LENGTH) if getattr(cfg, name) is not None)
    if explicit >= set(OF_BATCH):
        given = [*(name for name in given if name != "global_batch_size"), *OF_BATCH]
    refuse_given(given, f"budget.{quantity_}")
    start = _start_of_length(cfg)
    per_row = _of_a_row(cfg, model_cfg)
    cfg = cfg.model_copy(update={**start, "num_epochs": None, "time_budget": None})
    cfg, value = _steps(cfg, target, per_row)
    moved = {name: getattr(cfg, name) for name in LENGTH if getattr(cfg, name) != start[name]}
    before = {name: start[name] for name in moved}
    notices.append(remark(f"budget.{quantity_}", cfg.type, target, value, before, moved))
    return cfg.model_copy(update={"budget": cfg.budget.model_copy(update={"start": before or None})})


def _start_of_length(cfg: RunConfig) -> dict[str, Any]:
    """What the fields that a budget decides had been. ConfigError for a `budget.start` that is nothing of the kind."""
    given = cfg.budget.start or {}
    try:
        if set(given) <= set(LENGTH):
            began = type(cfg).model_validate({**cfg.model_dump(mode="json"), **given})
            return {name: getattr(began, name) for name in LENGTH}
    except ValidationError:
        pass
    raise ConfigError(f"budget.start ({given}) says nothing of {', '.join(LENGTH)} that these can be")


def _of_a_row(cfg: RunConfig, model_cfg: ModelConfig) -> float:
    """What a row of training costs of the budget."""
    if cfg.budget.tokens is not None:
        return float(cfg.train_seq_len)
    text = text_or_vocabulary(cfg, model_cfg, measured=cfg.budget.bytes is not None)
    if cfg.budget.bytes is not None:
        return cfg.train_seq_len * text.bytes_per_token
    try:
        adapter = unbuilt(cfg, model_cfg, text.vocab_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return cfg.train_seq_len * adapter.cost(cfg.train_seq_len).training_per_token


def _steps(cfg: RunConfig, target: float, per_row: float) -> tuple[RunConfig, float]:
    """The run that costs the target most nearly, and what it costs: of the steps that it has, else of others."""

    def cost(cfg: RunConfig) -> float:
        return stages_of(cfg, cfg.num_iterations).rows_before(cfg.num_iterations) * per_row

    def of_batch(rows: int) -> tuple[RunConfig, float]:
        cut = cfg.model_copy(update={"global_batch_size": rows})
        below = max(1, steps_of_rows(cut, target / per_row))
        found = [cut.model_copy(update={"num_iterations": steps}) for steps in (below, below + 1)]
        return min(((one, cost(one)) for one in found), key=lambda pair: abs(math.log(pair[1] / target)))

    if target_met(target, cost(cfg)):
        return cfg, cost(cfg)
    best = of_batch(cfg.global_batch_size)
    for rows in _batches(cfg):
        if target_met(target, best[1]):
            break
        best = min(best, of_batch(rows), key=lambda pair: abs(math.log(pair[1] / target)))
    return best


def _batches(cfg: RunConfig) -> Iterator[int]:
    """Rows of a step from those that it has on, to both sides, of which micro-batches and processes can be made."""
    if cfg.batch_stages is not None:
        return
    micro = cfg.batch_size if isinstance(cfg.batch_size, int) else 1
    unit = micro * (cfg.gradient_accumulation_steps or 1) * world_size(cfg.num_gpus, cfg.device)
    if isinstance(cfg.batch_size, int) and cfg.gradient_accumulation_steps is not None:
        return
    here = cfg.global_batch_size // unit
    for away in range(1, here + 1):
        yield from (number * unit for number in (here - away, here + away) if number >= 1)
