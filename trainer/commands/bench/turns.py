"""Sides that take turns, so that a noisy neighbour or a throttling chip hits all alike; medians and ratios of that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["interleaved", "median_ratio"]


def interleaved(
    sides: Mapping[str, Callable[[int], object]],
    turns: int,
    device: torch.device,
    warm_up: int = 2,
    before: Callable[[int], object] = lambda turn: None,
) -> dict[str, list[float]]:
    """Seconds of every call by side, after `warm_up` calls that allocate and compile. A side is called with the number
    of its turn, counted from 0 with the first warming one; `before` each call this is called, untimed."""
    for side in sides.values():
        for i in range(warm_up):
            before(i)
            side(i)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(turns):
        for name, side in sides.items():
            before(i + warm_up)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            side(i + warm_up)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the turns of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
