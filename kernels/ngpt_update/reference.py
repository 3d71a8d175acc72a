"""The definition of nGPT's step from one hidden state to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["reference"]

SHORTEST = 1e-24  # squared length of what has no direction


def reference(h: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
    """h and branch (..., D), alpha (D,) -> like h; computed in at least fp32."""
    stats = at_least_fp32(h.dtype)
    return _unit(torch.lerp(h.to(stats), _unit(branch.to(stats)), alpha.to(stats))).to(h.dtype)


def _unit(x: Tensor) -> Tensor:
    """x / ||x|| over the last axis, in fewer passes, forward and backward, than `F.normalize`."""
    return x * x.square().sum(-1, keepdim=True).clamp(min=SHORTEST).rsqrt()
