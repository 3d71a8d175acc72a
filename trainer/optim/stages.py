"""Stages of a run: how many rows a step has, as a closed form of the step.

Nothing is kept from one step to the next: where a step stands in the text, its rate and how many steps an epoch has
follow from its number and from the length of the run.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.optim import SCHEDULES

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["Stages", "common_rows", "decay_updates", "stages_of", "steps_of_rows"]


@dataclass(frozen=True)
class Stages:
    """Stage i lasts until step `ends[i]`; its steps have `rows[i]` rows over all processes, and `rates[i]` times the
    scheduled learning rate. The last one goes on for ever."""

    ends: tuple[int, ...]
    rows: tuple[int, ...]
    rates: tuple[float, ...]

    def at(self, step: int) -> int:
        """Index of the stage of a step."""
        return min(bisect.bisect_right(self.ends, step), len(self.ends) - 1)

    def rows_at(self, step: int) -> int:
        return self.rows[self.at(step)]

    def rate_at(self, step: int) -> float:
        """Multiplier of every learning rate."""
        return self.rates[self.at(step)]

    def rows_before(self, step: int) -> int:
        """Rows of the steps 0, ..., step - 1."""
        return sum((end - begin) * rows for begin, end, rows in self._spans(step))

    def parts(self, steps: int, changes: Iterable[float] = ()) -> list[tuple[int, float]]:
        """(first step, part of the first so many steps) of all that lies between the ends of stages and `changes`,
        shares of these steps."""
        changed = (
            bisect.bisect_left(range(steps), share, key=lambda step: step / steps) for share in changes
        )
        begins = sorted(step for step in {0, *self.ends[:-1], *changed} if step < steps)
        return [(begin, (end - begin) / steps) for begin, end in itertools.pairwise([*begins, steps])]

    def _spans(self, steps: int) -> list[tuple[int, int, int]]:
        """(begin, end, rows) of every stage within the first so many steps."""
        ends = [*(min(end, steps) for end in self.ends[:-1]), steps]
        return list(zip([0, *ends[:-1]], ends, self.rows, strict=True))


def stages_of(cfg: RunConfig, total: int) -> Stages:
    """Those of a run of `total` updates. Parts of the run are parts of its schedule: where `lr_decay_steps` ends that
    one earlier or later, they follow it."""
    if cfg.batch_stages is None:
        return Stages((total,), (cfg.global_batch_size,), (1.0,))
    length = decay_updates(cfg) or total
    return Stages(
        tuple(round(stage.until * length) for stage in cfg.batch_stages),
        tuple(stage.rows or cfg.global_batch_size for stage in cfg.batch_stages),
        tuple(stage.rate for stage in cfg.batch_stages),
    )


def common_rows(cfg: RunConfig) -> int:
    """The most rows that the steps of every stage are a multiple of. Micro-batches are made of these, so that all steps
    have micro-batches of one shape and differ in their number."""
    return math.gcd(*stages_of(cfg, 1).rows)


def steps_of_rows(cfg: RunConfig, rows: float) -> int:
    """How many updates a run has that reads so many rows at most, and would read more with another one."""
    if cfg.batch_stages is None:
        return math.floor(rows / cfg.global_batch_size)
    most = math.floor(rows / common_rows(cfg))
    return bisect.bisect_right(range(1, most + 1), rows, key=lambda n: stages_of(cfg, n).rows_before(n))


def decay_updates(cfg: RunConfig) -> int | None:
    """`lr_decay_steps`, the length of the schedule, where the scheduler reads it; None = all updates of the run."""
    return cfg.lr_decay_steps if "lr_decay_steps" in SCHEDULES[cfg.scheduler].reads else None
