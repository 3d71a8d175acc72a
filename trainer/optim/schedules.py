"""Learning-rate schedules: pure functions of the step, so that resume and sweeps need no state.

`trainer.optim.SCHEDULES` is the table of them. Each is called from the end of the warm-up on, with

    step    index of the update, from `warmup`
    warmup  number of updates of the warm-up
    end     the update from which the rate is at its floor
    floor   where the schedule ends, as a part of the peak
    cfg     the run, for what a schedule reads besides

and returns the multiplier of every learning rate.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from naming import look_up
from trainer.optim import SCHEDULES
from trainer.optim.stages import decay_updates, stages_of

if TYPE_CHECKING:
    from configs.schema import RunConfig


def schedule_factor(step: int, total: int, cfg: RunConfig) -> float:
    """Multiplier of every learning rate for one update, that of its stage (`batch_stages`) included.

    Warm-up rises linearly, (step + 1) / warmup, so that the first update is not lost and the last of the
    warm-up is at the full rate. After it the scheduler follows with progress counted to `lr_decay_steps`
    (null: all steps); from there on the rate stays at its floor.

    Args:
        step: index of the update, from 0.
        total: number of updates of the run.
        cfg: `scheduler`, `warmup_steps` or `warmup_ratio` (of `total`; wins), `cooldown_frac`,
            `min_lr_ratio` or `min_lr` (an absolute value of `learning_rate`; wins), `lr_decay_steps`.
    Raises:
        ValueError: an unknown scheduler; `lr_decay_steps` that end inside the warm-up.
    """
    assert step >= 0 and total >= 1, (step, total)
    row = look_up(SCHEDULES, cfg.scheduler, "scheduler")
    warmup, decay = warmup_updates(total, cfg), decay_updates(cfg)
    if decay is not None and decay <= warmup:
        raise ValueError(
            f"lr_decay_steps ({decay}) must exceed the warm-up of {warmup} steps; nearest: {warmup + 1}"
        )
    of_stage = stages_of(cfg, total).rate_at(step)
    if step < warmup:
        return of_stage * (step + 1) / warmup
    end = total if decay is None else decay
    floor = cfg.min_lr_ratio if cfg.min_lr is None else cfg.min_lr / cfg.learning_rate
    return of_stage * row.load()(step, warmup, end, floor, cfg)


def momentum_at(step: int, total: int, cfg: RunConfig) -> float:
    """Momentum of one update: from `muon_momentum_ends` linearly up to `muon_momentum` over the first part of the run,
    `muon_momentum_rise`, and back over the last, `muon_momentum_fall`; `muon_momentum` throughout where the ends are
    null. It ends where the learning rate's schedule does. Arguments as of `schedule_factor`."""
    top, ends, end = cfg.muon_momentum, cfg.muon_momentum_ends, decay_updates(cfg) or total
    if ends is None:
        return top
    risen = progress(step, 0, cfg.muon_momentum_rise * end)
    fallen = progress(step, end - cfg.muon_momentum_fall * end, end) if cfg.muon_momentum_fall else 0.0
    return ends + (top - ends) * min(risen, 1.0 - fallen)


def warmup_updates(total: int, cfg: RunConfig) -> int:
    """Number of warm-up updates of a run of `total` updates."""
    return cfg.warmup_steps if cfg.warmup_ratio is None else round(cfg.warmup_ratio * total)


def require_room_for_warmup(total: int, cfg: RunConfig) -> None:
    """ValueError where the warm-up takes the whole run, whose number of steps followed from its text or its time. Who
    states `lr_decay_steps` trains a part of a longer schedule."""
    warmup = warmup_updates(total, cfg)
    if warmup >= total and cfg.warmup_ratio is None and cfg.lr_decay_steps is None:
        raise ValueError(
            f"warmup_steps ({warmup}) must be less than the steps of this run, of which there are {total}. Set "
            f"warmup_ratio=0.1 instead, or warmup_steps={total - 1} or less"
        )


def jump(step: int, then: tuple[int, RunConfig], now: tuple[int, RunConfig]) -> str:
    """What to say where a run that goes on at `step` does not follow the schedule it had, else nothing. `then` and
    `now`: (number of updates, run)."""
    if step == 0:
        return ""
    was, is_ = (schedule_factor(step - 1, total, cfg) for total, cfg in (then, now))
    if abs(was - is_) <= 0.1 * max(was, is_):
        return ""
    told = f"the learning rate jumps from {was:.2g} to {is_:.2g} of its peak at step {step}"
    if then[0] == now[0] or now[1].lr_decay_steps is not None:
        return f"{told}: the schedule is not the one of the run so far"
    return (
        f"{told}: its schedule now spans {now[0]:,} steps and not {then[0]:,}. lr_decay_steps={then[0]} keeps the "
        f"rates as they were, flat after step {then[0]}; to train on from before they fell, branch off from an earlier "
        f"checkpoint (output_dir=<new> resume=<run>/checkpoint-<step>)"
    )


def progress(step: int, start: float, end: float) -> float:
    """0 at `start`, 1 from `end` on."""
    if step >= end:
        return 1.0
    return 0.0 if step <= start else (step - start) / (end - start)


def constant(step: int, warmup: int, end: int, floor: float, cfg: RunConfig) -> float:
    return 1.0


def linear(step: int, warmup: int, end: int, floor: float, cfg: RunConfig) -> float:
    return 1.0 - (1.0 - floor) * progress(step, warmup, end)


def cosine(step: int, warmup: int, end: int, floor: float, cfg: RunConfig) -> float:
    """Loshchilov and Hutter, SGDR (arXiv:1608.03983), eq. 5, one cycle."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress(step, warmup, end)))


def cooldown(step: int, warmup: int, end: int, floor: float, cfg: RunConfig) -> float:
    """Flat, then linear over the last `cooldown_frac` of the run (Hägele et al., arXiv:2405.18392)."""
    start = max(warmup, end * (1.0 - cfg.cooldown_frac))
    return 1.0 - (1.0 - floor) * progress(step, start, end)


def cooldown_inverse_sqrt(step: int, warmup: int, end: int, floor: float, cfg: RunConfig) -> float:
    """Flat, then over the last `cooldown_frac` of the run as 1 / sqrt(1 + 10 x) of the part x of it, stretched so as to
    go from the peak to the floor: h(x) / h(1) of the fall, h(x) = 1 / sqrt(1 + alpha x) - 1 (Ibrahim et al.,
    arXiv:2403.08763, section 7; the authors' code has alpha = 10). H-Net's recipe names an inverse square root and no
    alpha. Another shape is 1 - sqrt(x) (Hägele et al., arXiv:2405.18392): after a quarter it has left half of the peak,
    this one a third."""
    start = max(warmup, end * (1.0 - cfg.cooldown_frac))
    fallen, whole = (1.0 - (1.0 + 10.0 * x) ** -0.5 for x in (progress(step, start, end), 1.0))
    return 1.0 - (1.0 - floor) * fallen / whole


def inverse_sqrt(step: int, warmup: int, end: int, floor: float, cfg: RunConfig) -> float:
    """sqrt(warm-up / step), after Vaswani et al. (arXiv:1706.03762), eq. 3; not below the floor."""
    warmup = max(warmup, 1)
    return max(floor, math.sqrt(warmup / max(min(step, end), warmup)))
