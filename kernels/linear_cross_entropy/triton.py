"""The chunked path with the row step in Triton, as one operation: products by the library, logits as it left them.

The whole of it is opaque to the compiler, since it decides by itself how many rows there are at a time. Gradients are
made in the forward pass and only scaled in the backward: right for the sum, which is the only output that has any.

Shapes: M rows, k targets of each, D width, V states, V_p rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kernels.choose import rows_at_once
from kernels.chunks import Rows, States, in_chunks, refuse_second_order, scaled
from kernels.library import opaque
from kernels.linear_cross_entropy.reference import weighed
from kernels.linear_cross_entropy.row_kernel import CROSS_ENTROPY, Cap, Loss, overwrite
from kernels.precision import own_dtypes
from kernels.softcap import Softcap

__all__ = ["by_rows", "linear_cross_entropy"]

# Sum, nats, aux, gradients of hidden, weight and bias.
Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    *,
    vocab_size: int,
    softcap: Softcap | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments and results as `reference`."""
    rows = weighed(hidden, targets, weights, z_loss)
    states = States(vocab_size, vocab_size, None)
    total, nats, z = _operation("cross_entropy", states, hidden, weight, None, rows, softcap)
    return total, nats.view_as(targets), z if z_loss else None


def by_rows(name: str, losses: Mapping[str, Loss]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The operation `mytrainer::<name>` for these losses, as a function `(loss, states, hidden, weight, bias, rows,
    softcap=None)`: (sum (), nats, aux) as `kernels.chunks.differentiable` returns them."""

    def launch(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        aux_weights: Tensor | None,
        targets: Tensor,
        noisy: Tensor | None,
        scalars: Tensor | None,
        loss: str,
        states: list[int],
        cap: list[float] | None,
        needed: list[bool],
    ) -> Found:
        V, n, mask_id = states
        space = States(V, n, mask_id if mask_id >= 0 else None)
        rows = Rows(
            tuple(t.contiguous() for t in (targets, noisy) if t is not None),
            weights.contiguous(),
            None if aux_weights is None else aux_weights.contiguous(),
            () if scalars is None else (scalars,),
        )
        bounds: Cap = (cap[0], cap[1], cap[2], cap[3]) if cap else None
        with own_dtypes(hidden.device):
            found = in_chunks(
                hidden,
                weight,
                bias,
                rows,
                lambda z, part, gradient: overwrite(losses[loss], z, part, space, gradient, bounds),
                V=V,
                chunk_rows=rows_at_once(name, weight.shape[0], hidden.device, hidden.dtype),
                needed=(needed[0], needed[1], needed[2]),
                in_place=True,
            )
            return found.total(rows), *found

    operation = opaque(name, launch, _without_values, flops=_flops)
    operation.register_autograd(_differentiate, setup_context=_save)

    def call(
        loss: str,
        states: States,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        softcap: Softcap | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = [
            torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)
        ]
        total, nats, aux, *_ = operation(
            hidden,
            weight,
            bias,
            rows.weights,
            rows.aux_weights,
            *(*rows.ids, None)[:2],
            torch.stack(rows.scalars, 1) if rows.scalars else None,
            loss,
            [states.V, states.n, -1 if states.mask_id is None else states.mask_id],
            None if softcap is None else softcap.as_sigmoid,
            needed,
        )
        return total, nats, aux

    return call


def _without_values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    aux_weights: Tensor | None,
    targets: Tensor,
    noisy: Tensor | None,
    scalars: Tensor | None,
    loss: str,
    states: list[int],
    cap: list[float] | None,
    needed: list[bool],
) -> Found:
    rows, width = hidden.shape
    columns = weight.shape[0]
    return (
        weights.new_empty(()),
        weights.new_empty(weights.shape),
        weights.new_empty(0 if aux_weights is None else rows),
        hidden.new_empty(rows if needed[0] else 0, width),
        weights.new_empty(columns if needed[1] else 0, width),
        weights.new_empty(columns if needed[2] else 0),
    )


def _flops(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """2 M V_p D of the logits, and as many of either gradient."""
    needed = args[-1]
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + needed[0] + needed[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Found) -> None:
    hidden, weight, bias, weights, aux_weights, *_, needed = inputs
    _, nats, aux, *gradients = output
    ctx.mark_non_differentiable(nats, aux, *gradients)
    kept = [g if need else None for g, need in zip(gradients, needed, strict=True)]
    kept += [nats, None if aux_weights is None else aux]
    ctx.save_for_backward(*kept)
    ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, weights, aux_weights)]


def _differentiate(ctx: Any, of_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_order()
    found = [
        scaled(g, of_sum, dtype) if needs else None
        for g, dtype, needs in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return *found, *(None,) * 7


_operation = by_rows("linear_cross_entropy", {"cross_entropy": CROSS_ENTROPY})
