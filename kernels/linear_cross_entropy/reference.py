"""The definition of the head loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["IGNORED", "reference"]

IGNORED = -100  # a target of this value scores 0 and gives no gradient


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The definition, with all logits in memory. Arguments and results as `linear_cross_entropy`."""
    logits = F.linear(hidden, weight[:vocab_size].to(hidden.dtype))  # (N, V)
    logits = logits.to(at_least_fp32(logits.dtype))
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")  # (N,)
    total = nats.sum() if weights is None else (nats * weights.to(nats.dtype)).sum()
    return total, nats.detach()
