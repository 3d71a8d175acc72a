"""A way to scan as an operation of torch.library, with its gradients.

Shapes: B rows of T steps, E channels of N states each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.library import opaque
from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["operation"]

Sizes = tuple[int, int, int, int]  # B, T, E, N
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def operation(
    name: str,
    forward: Callable[..., None],
    backward: Callable[..., None],
    kept_shape: Callable[..., tuple[int, ...]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of an implementation (`reference` has its arguments and results).

    `forward(y, final, kept, *arguments)` fills y, the last states and, unless it is empty, `kept`, of the shape
    `kept_shape(*Sizes)`: the states that `backward(made, dy, dfinal, *arguments, kept)` starts from again. That fills
    `made`: the gradients of all arguments but `reset`, those of parameters, B, C and states in at least fp32, without
    elements for arguments that are None.
    """

    def run(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        initial: Tensor | None,
        reset: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, final, kept = outputs(u, delta, A, B, C, D, z, delta_bias, initial, reset, keep)
        with own_dtypes(u.device):
            forward(y, final, kept, u, delta, A, B, C, D, z, delta_bias, initial, reset)
        return y, final, kept

    def outputs(u: Tensor, delta: Tensor, A: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What `run` returns, without values."""
        keep, stats = args[-1], at_least_fp32(u.dtype)
        kept = kept_shape(*u.shape, A.shape[1]) if keep else (0,)
        return (
            torch.empty(u.shape, dtype=u.dtype, device=u.device),
            torch.empty((len(u), *A.shape), dtype=stats, device=u.device),
            torch.empty(kept, dtype=stats, device=u.device),
        )

    def differentiate(
        dy: Tensor,
        dfinal: Tensor | None,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        initial: Tensor | None,
        reset: Tensor | None,
        kept: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        made = gradients(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial)
        with own_dtypes(u.device):
            backward(made, dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial, reset, kept)
        return made

    operate = opaque(f"selective_scan_{name}", run, outputs, flops=_flops)
    differentiated = opaque(
        f"selective_scan_{name}_backward", differentiate, gradients, flops=_backward_flops
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:-1], output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    def of_autograd(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None and dfinal is None:
            return (None,) * 11
        *given, kept = ctx.saved_tensors
        dy = torch.zeros_like(given[0]) if dy is None else dy
        found = differentiated(dy, dfinal, *given, kept)
        same = (None if t is None else d.to(t.dtype) for t, d in zip(given, found, strict=False))
        return *same, None, None

    operate.register_autograd(of_autograd, setup_context=save)

    def scan(*args: Tensor | None, **named: Tensor | None) -> tuple[Tensor, Tensor]:
        given = dict(zip(NAMES, args, strict=False)) | named
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given.values())
        y, final, _ = operate(*(given[name] for name in NAMES), keep)
        return y, final

    return scan


NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial", "reset")


def gradients(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the backward pass returns, without values."""
    stats = at_least_fp32(u.dtype)

    def like(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        if t is None:
            return torch.empty(0, dtype=stats, device=u.device)
        return torch.empty(t.shape, dtype=dtype or t.dtype, device=u.device)

    return (
        like(u),
        like(delta),
        like(A, stats),
        like(B, stats),
        like(C, stats),
        like(D, stats),
        like(z),
        like(delta_bias, stats),
        like(initial, stats),
    )


def _flops(u: tuple[int, ...], delta: Any, A: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """9 of each state and step, as it is counted in general: exponential, products and sums."""
    return 9 * u[0] * u[1] * A[0] * A[1]


def _backward_flops(dy: Any, dfinal: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(*args, **kwargs)
