"""The Newton-Schulz iteration and the Muon step as others compute them, for the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from kernels.newton_schulz.coefficients import COEFFICIENTS

__all__ = ["of_torch", "torch_muon"]


def of_torch(matrices: Tensor, *, coefficients: str, steps: int, dtype: torch.dtype) -> Tensor:
    """The iteration of `torch.optim.Muon`, which walks over matrices one by one, in bf16, with one polynomial for all
    steps."""
    from torch.optim._muon import _zeropower_via_newtonschulz  # ImportError in a torch without it

    chosen = COEFFICIENTS[coefficients]
    (polynomial,) = chosen.of_steps
    return torch.stack([_zeropower_via_newtonschulz(m, polynomial, steps, chosen.epsilon) for m in matrices])


def torch_muon(parameters: Iterable[Parameter], lr: float = 0.02) -> Callable[[], None]:
    """One step of `torch.optim.Muon` on matrices (m, n) that have gradients, with the options of ours as they are by
    default: what a step of `trainer.optim.muon.Muon` is timed against."""
    optimizer = torch.optim.Muon(parameters, lr=lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="original")
    return optimizer.step
