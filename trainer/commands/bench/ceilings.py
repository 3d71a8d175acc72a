"""What this machine can do at best, measured here and now: what a figure is a percentage of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["copy_rate", "product_rate"]

TRIES = 5
# Large enough that caches do not matter and launches do not show; small enough for a few tenths of a second.
COPIED_BYTES = {"cpu": 2**26, "cuda": 2**30}
PRODUCT_WIDTH = {"cpu": 1024, "cuda": 8192}


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy of one large tensor reads and writes, together."""
    count = COPIED_BYTES.get(device.type, 2**28)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / _least_seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of large square matrices; a multiply-add is two."""
    width = PRODUCT_WIDTH.get(device.type, 2048)
    a, b = (torch.ones(width, width, dtype=dtype, device=device) for _ in range(2))
    return 2.0 * width**3 / _least_seconds(lambda: a @ b, device)


def _least_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call: the least of a few, as what disturbs only adds."""
    seconds = []
    for _ in range(TRIES + 1):  # the first allocates
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
