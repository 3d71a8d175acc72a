"""What changes over a run, as a function of how much of it lies behind: windows and their rotation (YaRN, Peng et al.
2023, arXiv:2309.00071), and how much targets count."""

from __future__ import annotations

import math
from collections.abc import Sequence

from models.current_best.config import CurrentBestConfig
from models.current_best.records import Stage

__all__ = [
    "frequencies",
    "prefix_weight",
    "rotation_of",
    "shares",
    "stage_at",
    "target_weights",
    "yarn",
]

BASE, FULL_BASE = 1024.0, 10000.0
TURNS = 31.0  # of a dim in a window, from which on it keeps its frequency


def stage_at(stages: Sequence[Stage], done: float) -> int:
    """The stage that a step belongs to; `done`: share of the run behind it."""
    return max(n for n, stage in enumerate(stages) if stage.start <= done)


def shares(stages: Sequence[Stage]) -> list[float]:
    """How much of the run each stage is."""
    ends = [stage.start for stage in stages[1:]] + [1.0]
    return [end - stage.start for stage, end in zip(stages, ends, strict=True)]


def frequencies(cfg: CurrentBestConfig) -> list[float]:
    """Of a token's angle per place, of each pair of dims that turns: 1024^(-i / (n - 1)) of n = h/4, or 10000^(-2i/h)
    of all h/2."""
    if cfg.rope_style == "full":
        return [FULL_BASE ** (-2 * i / cfg.head_width) for i in range(cfg.head_width // 2)]
    turning = cfg.head_width // 4
    return [BASE ** (-i / max(1, turning - 1)) for i in range(turning)]


def yarn(omega: list[float], scale: float, old: int, new: int) -> tuple[list[float], float]:
    """Frequencies and the scale of scores when the long window goes from `old` tokens to `new`."""
    ratio, found = old / new, []
    for w in omega:
        kept = min(1.0, max(0.0, (old * w / (2 * math.pi) - 1) / TURNS))
        found.append(w * (ratio + kept * (1 - ratio)))
    return found, scale * (1 + 0.2 * math.log(new / old))


def rotation_of(cfg: CurrentBestConfig, stage: int) -> tuple[list[float], float]:
    """(frequencies, scale of scores) in a stage of the run."""
    omega, scale = frequencies(cfg), cfg.scale_of_scores
    if cfg.of("yarn_windows") and not cfg.dense:
        windows = [cfg.window(each.long) for each in cfg.stages[: stage + 1]]
        for old, new in zip(windows, windows[1:], strict=False):
            omega, scale = yarn(omega, scale, old, new)
    return omega, scale


def target_weights(starts: Sequence[float], done: float) -> list[float]:
    """Of the next token and those behind it. In each of n equal parts of the run the furthest that is left goes evenly
    to 0, and in the last part the next token alone counts."""
    n, found = len(starts), []
    for k, start in enumerate(starts):
        left = (n - k) - n * done if k else 1.0  # of the part in which it goes
        found.append(start * min(1.0, max(0.0, left)))
    return found


def prefix_weight(start: float, done: float) -> float:
    """Of the prefix: whole in the first third, evenly to 0 in the second."""
    return start * min(1.0, max(0.0, 2 - 3 * done))
