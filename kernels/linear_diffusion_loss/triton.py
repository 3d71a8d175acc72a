"""The losses of discrete diffusion with the row step in Triton (kernels/linear_cross_entropy/triton.py)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kernels.chunks import States
from kernels.linear_cross_entropy.triton import by_rows
from kernels.linear_diffusion_loss.chunked import weighed
from kernels.linear_diffusion_loss.epilogues import LOSSES
from kernels.linear_diffusion_loss.reference import product_dtype

__all__ = ["linear_diffusion_loss"]

_operation = by_rows("linear_diffusion_loss", LOSSES)


def linear_diffusion_loss(
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments and results as `reference`."""
    states = States(V, n, mask_id)
    rows = weighed(hidden, x0, xt, weights, coefficients, mode, states, aux_weight)
    hidden = hidden.to(product_dtype(hidden))
    total, nats, aux = _operation(mode, states, hidden, weight, bias, rows)
    return total, nats, None if rows.aux_weights is None else aux
