"""A kernel of the convolution as an operation of torch.library, with its gradients.

Shapes: B rows, T tokens, E channels, k taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.documents import runs
from kernels.library import opaque

__all__ = ["Gradients", "operation"]

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of x, weight, bias, initial


def operation(
    name: str, forward: Callable[..., None], backward: Callable[..., None]
) -> Callable[..., Tensor]:
    """The function of an implementation (`reference` has its arguments and result).

    `forward(y, *arguments)` fills y; `backward(made, dy, *arguments)` fills the gradients of all arguments but the
    last two: that of x in its dtype, the others fp32, without elements for arguments that are None. In place of
    doc_ids they are given `run` (B, T) int32: the number of each token's document in its row.
    """

    def run_forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        run: Tensor | None,
        activation: bool,
    ) -> Tensor:
        y = outputs(x)
        if y.numel():
            forward(y, x, weight, bias, initial, run, activation)
        return y

    def run_backward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        run: Tensor | None,
        activation: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        made = gradients(dy, x, weight, bias, initial)
        if x.numel():
            backward(made, dy, x, weight, bias, initial, run, activation)
        else:
            for grad in made:
                grad.zero_()
        return made

    operate = opaque(f"causal_conv1d_{name}", run_forward, outputs, flops=_flops)
    differentiated = opaque(
        f"causal_conv1d_{name}_backward",
        run_backward,
        gradients,
        flops=lambda dy, *args, **kwargs: 3 * _flops(*args),
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    def of_autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        found = differentiated(dy, *given, ctx.activation)
        same = (None if t is None else d.to(t.dtype) for t, d in zip(given, found, strict=False))
        return *same, None, None

    operate.register_autograd(of_autograd, setup_context=save)

    def causal_conv1d(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        doc_ids: Tensor | None,
        *,
        activation: bool,
    ) -> Tensor:
        run = None if doc_ids is None else runs(doc_ids).to(torch.int32)
        result: Tensor = operate(x, weight, bias, initial, run, activation)
        return result

    return causal_conv1d


def outputs(x: Tensor, *args: Any) -> Tensor:
    """What the forward pass returns, without values."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the backward pass returns, without values."""

    def like(t: Tensor | None) -> Tensor:
        return torch.empty((0,) if t is None else t.shape, dtype=torch.float32, device=x.device)

    return torch.empty(x.shape, dtype=x.dtype, device=x.device), like(weight), like(bias), like(initial)


def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * x[2] * weight[2]
