"""`save_precision`: weights in fewer bits, and what that does to them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PRECISIONS", "Rounding"]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Rounding:
    """Puts parameters into a precision, None leaving them as they are, and keeps account of what it changed."""

    def __init__(self, precision: str | None) -> None:
        self.precision = precision
        self.dtype = None if precision is None else PRECISIONS[precision]
        self.worst = (0.0, "")  # largest change of a tensor relative to its norm, and its name
        self.vanished = 0  # weights that became 0

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """ValueError names a tensor that the precision has no numbers for, or that holds what is none."""
        if self.dtype is None or not tensor.is_floating_point():
            return tensor
        if tensor.isnan().any():
            raise ValueError(
                f"save_precision: {name} holds NaN, which cannot be rounded. null writes it as it is"
            )
        rounded = tensor.to(self.dtype)
        if not torch.equal(rounded.isinf(), tensor.isinf()):
            raise ValueError(
                f"save_precision: {name} holds {tensor.abs().max().item():.4g}, and {self.precision} ends at "
                f"{torch.finfo(self.dtype).max:.5g}. bf16 has the range of fp32"
            )
        numbers = tensor[tensor.isfinite()]  # the infinite stay as they are, and change no norm
        moved = (rounded[tensor.isfinite()].to(tensor.dtype) - numbers).norm().item()
        norm = numbers.norm().item()
        if moved:
            self.worst = max(self.worst, (moved / norm, name))
            self.vanished += int(((rounded == 0) & (tensor != 0)).sum())
        return rounded

    @property
    def changed(self) -> bool:
        """Whether any weight is not what it was."""
        return self.worst[0] > 0

    def __str__(self) -> str:
        """What was lost; "" where nothing was."""
        if not self.changed:
            return ""
        change, name = self.worst
        gone = f"; {self.vanished:,} weights became 0" if self.vanished else ""
        return f"rounded to {self.precision}: no tensor changed by more than {change:.2g} of its norm ({name}){gone}"
