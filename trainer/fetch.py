"""A value of the device that the host reads later, when it is there."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Fetched"]


class Fetched:
    """A scalar on its way to the host. `item()` waits for what came before it alone: that of a device tensor waits for
    all that was enqueued since too."""

    def __init__(self, value: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._value = value
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def item(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value.item()
