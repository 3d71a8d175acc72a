"""Learning-rate schedules: pure functions of the step, so that resume and sweeps need no state."""

import math
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any


def schedule_factor(step: int, total: int, cfg: Any) -> float:
    """Multiplier of every learning rate for one update.

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
    shape = SCHEDULERS.get(cfg.scheduler)
    if shape is None:
        close = get_close_matches(str(cfg.scheduler), SCHEDULERS, n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"scheduler: {cfg.scheduler!r} is not one of {', '.join(SCHEDULERS)}{hint}")
    warmup = warmup_updates(total, cfg)
    if cfg.lr_decay_steps is not None and cfg.lr_decay_steps <= warmup:
        raise ValueError(
            f"lr_decay_steps ({cfg.lr_decay_steps}) must exceed the warm-up of {warmup} steps; "
            f"nearest: {warmup + 1}"
        )
    if step < warmup:
        return (step + 1) / warmup
    end = total if cfg.lr_decay_steps is None else cfg.lr_decay_steps
    floor = cfg.min_lr_ratio if cfg.min_lr is None else cfg.min_lr / cfg.learning_rate
    return shape(step, warmup, end, floor, cfg.cooldown_frac)


def warmup_updates(total: int, cfg: Any) -> int:
    """Number of warm-up updates of a run of `total` updates."""
    return cfg.warmup_steps if cfg.warmup_ratio is None else round(cfg.warmup_ratio * total)


def _progress(step: int, start: float, end: float) -> float:
    """0 at `start`, 1 from `end` on."""
    if step >= end:
        return 1.0
    return 0.0 if step <= start else (step - start) / (end - start)


def _constant(step: int, warmup: int, end: int, floor: float, cooldown_frac: float) -> float:
    return 1.0


def _linear(step: int, warmup: int, end: int, floor: float, cooldown_frac: float) -> float:
    return 1.0 - (1.0 - floor) * _progress(step, warmup, end)


def _cosine(step: int, warmup: int, end: int, floor: float, cooldown_frac: float) -> float:
    """Loshchilov and Hutter, SGDR (arXiv:1608.03983), eq. 5, one cycle."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup, end)))


def _cooldown(step: int, warmup: int, end: int, floor: float, cooldown_frac: float) -> float:
    """Flat, then linear over the last `cooldown_frac` of the run (Hägele et al., arXiv:2405.18392)."""
    start = max(warmup, end * (1.0 - cooldown_frac))
    return 1.0 - (1.0 - floor) * _progress(step, start, end)


def _inverse_sqrt(step: int, warmup: int, end: int, floor: float, cooldown_frac: float) -> float:
    """sqrt(warm-up / step), after Vaswani et al. (arXiv:1706.03762), eq. 3; not below the floor."""
    warmup = max(warmup, 1)
    return max(floor, math.sqrt(warmup / max(min(step, end), warmup)))


SCHEDULERS: dict[str, Callable[[int, int, int, float, float], float]] = {
    "cooldown": _cooldown,
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "inverse_sqrt": _inverse_sqrt,
}
