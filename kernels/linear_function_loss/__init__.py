"""Output projection and a loss given as a function of logits, which need not exist for all rows at once.

Shapes: M rows, D width, V states, V_p rows of the head (V, or more with padding).
"""

from __future__ import annotations

from torch import Tensor

from kernels.choose import Kernels
from kernels.linear_function_loss import chunked
from kernels.linear_function_loss.reference import RowFunction, reference
from kernels.linear_function_loss.sizes import SPEC

__all__ = ["SPEC", "RowFunction", "linear_function_loss", "reference"]


def linear_function_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    weights: Tensor,
    function: RowFunction,
    *,
    V: int,
    aux_weight: float = 0.0,
    chunk_rows: int | None = None,
    kernels: Kernels | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns `sum_i weights_i (nats_i + aux_weight ce_i)`, (), differentiable in hidden, weight and bias; nats, (M,)
    and ce, (M,) detached, the latter None where `function` gives none.

    hidden (M, D); weight (V_p, D); bias (V_p,); weights (M,), constants. `function(logits (m, V), rows)` returns nats
    (m,) and a cross-entropy (m,) or None for a slice of the rows, which must not depend on the others; it is called
    outside of autocast with logits of at least fp32. `kernels` of the run choose the implementation; None =
    automatically. `chunk_rows` given: chunks of that many.
    """
    if chunk_rows is not None:
        return chunked.chunked(
            hidden, weight, bias, weights, function, V=V, aux_weight=aux_weight, chunk_rows=chunk_rows
        )
    run = (kernels or Kernels()).implementation(
        "linear_function_loss", rows=len(hidden), columns=V, device=hidden.device, dtype=hidden.dtype
    )
    return run(hidden, weight, bias, weights, function, V=V, aux_weight=aux_weight)
