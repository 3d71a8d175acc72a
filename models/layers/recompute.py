"""What recomputing activations in backward must not compute anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kernels.library import opaque

__all__ = ["Kept", "keep", "recomputing"]

_KEPT_OPERATIONS: list[Any] = []


def keep(operation: Any) -> Any:
    """An operation of torch.library without gradients that is not run again where activations are recomputed: what it
    returned stays in memory. A block that calls it has a `Kept` among its modules."""
    _KEPT_OPERATIONS.append(operation._opoverload)
    return operation


class Kept(nn.Module):
    """The identity, whose value stays in memory where activations are recomputed.

    For what decisions are made of (scores of experts): computed anew, rounding or noise may decide otherwise, and then
    gradients belong to no forward pass. Keep little: it is what recomputation saves otherwise. A module, so that a
    block shows whether it has any.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _kept(x) if torch.is_grad_enabled() else x


def recomputing(block: nn.Module) -> Callable[..., Any]:
    """`block.forward`, whose activations are computed anew in backward instead of being kept, where it trains."""
    forward = block.forward
    options: dict[str, Any] = {}
    if any(isinstance(module, Kept) for module in block.modules()):
        # Every operation then goes through Python, which costs a block of the smallest models a fifth of its time.
        options["context_fn"] = partial(create_selective_checkpoint_contexts, list(_KEPT_OPERATIONS))

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if block.training and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)
        return forward(*args, **kwargs)

    return recomputed


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_kept = keep(opaque("kept", _copy, _like))
_kept.register_autograd(lambda ctx, gradient: gradient)
