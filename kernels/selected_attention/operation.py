"""A kernel of selected attention as an operation of torch.library, with its gradients.

Shapes: B rows, T queries, S keys, H heads in G groups, h width of keys, w of values, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.library import opaque

__all__ = ["operation"]


def operation(
    name: str, forward: Callable[..., None], backward: Callable[..., None]
) -> Callable[..., Tensor]:
    """The function of an implementation (`reference` has its arguments and result).

    `forward((o, totals), *arguments)` fills o (B, T, H, w) and `totals` (B, T, H), fp32: of the exponentials, as the
    implementation wants them again. `backward((dq, dk, dv), do, q, k, v, starts, positions, o, totals, block, scale)`
    fills the gradients. Both get q, k and v of one dtype, and never a call without queries or without blocks.
    """

    def run_forward(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, positions: Tensor, block: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        o, totals = made = outputs(q, k, v)
        if q.numel() and starts.numel():
            forward(made, q, k, v, starts, positions, block, scale)
        else:
            o.zero_(), totals.zero_()
        return made

    def run_backward(
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: Tensor,
        positions: Tensor,
        o: Tensor,
        totals: Tensor,
        block: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        made = gradients(do, q, k, v)
        if q.numel() and starts.numel():
            backward(made, do, q, k, v, starts, positions, o, totals, block, scale)
        else:
            for grad in made:
                grad.zero_()
        return made

    operate = opaque(name, run_forward, outputs, flops=_flops)
    differentiated = opaque(f"{name}_backward", run_backward, gradients, flops=_backward_flops)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.block, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    def of_autograd(ctx: Any, do: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        found = differentiated(do, *ctx.saved_tensors, ctx.block, ctx.scale)
        return *found, None, None, None, None

    operate.register_autograd(of_autograd, setup_context=save)

    def selected_attention(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, positions: Tensor, *, block: int, scale: float
    ) -> Tensor:
        o: Tensor
        o, _ = operate(q, k.to(q.dtype), v.to(q.dtype), starts, positions, block, scale)
        return o

    return selected_attention


def outputs(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """What the forward pass returns, without values."""
    lead = q.shape[:3]
    return (
        torch.empty(*lead, v.shape[3], dtype=q.dtype, device=q.device),
        torch.empty(lead, dtype=torch.float32, device=q.device),
    )


def gradients(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward pass returns, without values."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    return dq, dk, dv


def _flops(q: Any, k: Any, v: Any, starts: Any, positions: Any, block: int, *args: Any, **kwargs: Any) -> int:
    """As if every list were full."""
    return 2 * q[0] * q[1] * q[2] * min(starts[3] * block, k[1]) * (k[3] + v[3])


def _backward_flops(do: Any, q: Any, k: Any, v: Any, starts: Any, *args: Any, **kwargs: Any) -> int:
    block = args[3]
    return 2 * q[0] * q[1] * q[2] * min(starts[3] * block, k[1]) * (3 * k[3] + 2 * v[3])
