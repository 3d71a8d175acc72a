"""Losses of discrete diffusion, a few rows at a time (kernels/chunks.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.choose import rows_at_once
from kernels.chunks import Rows, States, differentiable
from kernels.linear_diffusion_loss.reference import product_dtype
from kernels.linear_diffusion_loss.rows import MODES
from kernels.precision import at_least_fp32

__all__ = ["chunked", "weighed"]


def chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x0: Tensor,
    xt: Tensor,
    weights: Tensor,
    coefficients: Mapping[str, Tensor],
    *,
    mode: str,
    V: int,
    n: int,
    mask_id: int | None,
    aux_weight: float | Tensor = 0.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments and results as `reference`; `chunk_rows` None = as many as the table allows."""
    states, dtype = States(V, n, mask_id), product_dtype(hidden)
    rows = weighed(hidden, x0, xt, weights, coefficients, mode, states, aux_weight)
    chunk_rows = chunk_rows or rows_at_once("linear_diffusion_loss", V, hidden.device, rows.weights.dtype)
    total, nats, aux = differentiable(MODES[mode], states, hidden.to(dtype), weight, bias, rows, chunk_rows)
    return total, nats, None if rows.aux_weights is None else aux


@torch.no_grad()
def weighed(
    hidden: Tensor,
    x0: Tensor,
    xt: Tensor,
    weights: Tensor,
    coefficients: Mapping[str, Tensor],
    mode: str,
    states: States,
    aux_weight: float | Tensor,
) -> Rows:
    """What the row steps read: weights of both parts and the mode's scalars, in the dtype of statistics."""
    stats = at_least_fp32(hidden.dtype)
    scalars = MODES[mode].prepare(x0, xt, coefficients, states)
    weights = weights.to(stats)
    aux_weights: Tensor | None = None
    if isinstance(aux_weight, Tensor):
        aux_weights = aux_weight.to(stats)
    elif aux_weight != 0:
        aux_weights = aux_weight * weights
    return Rows((x0, xt), weights, aux_weights, tuple(s.to(stats) for s in scalars))
