"""The definition: all logits at once, gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["RowFunction", "reference", "weighed"]

RowFunction = Callable[[Tensor, slice], tuple[Tensor, "Tensor | None"]]


def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    weights: Tensor,
    function: RowFunction,
    *,
    V: int,
    aux_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments and results as `linear_function_loss`."""
    total, nats, ce = weighed(hidden, weight, bias, weights, function, slice(0, len(hidden)), V, aux_weight)
    return total, nats.detach(), None if ce is None else ce.detach()


def weighed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    weights: Tensor,
    function: RowFunction,
    rows: slice,
    V: int,
    aux_weight: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum (), nats (m,) and cross-entropy (m,) of `rows`, whose hidden (m, D) and weights (m,) are given."""
    dtype = at_least_fp32(hidden.dtype)
    logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))[:, :V].to(dtype)  # (m, V)
    with own_dtypes(logits.device):  # probabilities are no matter of 8 bits
        nats, ce = function(logits, rows)
    value = nats if ce is None else nats + aux_weight * ce
    return (value * weights.to(dtype)).sum(), nats, ce
