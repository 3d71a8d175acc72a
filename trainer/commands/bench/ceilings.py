"""What this machine can do at best, measured here and now: what a figure is a percentage of."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainer.commands.bench.turns import interleaved

__all__ = ["ceilings"]

TRIES = 10
# Large enough that caches do not matter and launches do not show; small enough for a few tenths of a second.
COPIED_BYTES = {"cpu": 2**26, "cuda": 2**29}
PRODUCT_WIDTH = {"cpu": 1024, "cuda": 8192}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """`bytes_per_second` of a copy, read and written together; `flops_per_second` of a product of square matrices."""
    size, width = COPIED_BYTES.get(device.type, 2**26), PRODUCT_WIDTH.get(device.type, 1024)
    source = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    square = torch.randn(width, width, device=device).to(dtype)
    sides: dict[str, Callable[[int], object]] = {
        "copy": lambda turn: target.copy_(source),
        "product": lambda turn: square @ square,
    }
    seconds = interleaved(sides, TRIES, device)
    return {  # by the least of the times, as what disturbs only adds
        "bytes_per_second": 2 * size / min(seconds["copy"]),
        "flops_per_second": 2 * width**3 / min(seconds["product"]),
    }
