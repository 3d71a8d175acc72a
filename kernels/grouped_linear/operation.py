"""A way to multiply groups of rows as an operation of torch.library, with its gradients.

Shapes: M rows in E groups, K columns in, N columns out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kernels.library import opaque

__all__ = ["operation"]

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def operation(name: str, multiply: Product, multiply_outer: Product) -> Product:
    """The function of an implementation (`reference` has its arguments and result), where there are rows made of
    `multiply(x (M, K), weight (E, N, K), ends)` -> (M, N) and `multiply_outer(dy (M, N), x (M, K), ends)` -> (E, N, K),
    the products dy^T x of every group, 0 where it is empty."""

    def rows(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return multiply(x, weight, ends) if len(x) else x.new_empty(0, weight.shape[1])

    def matrices(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        if len(x):
            return multiply_outer(dy, x, ends)
        return x.new_zeros(len(ends), dy.shape[1], x.shape[1])

    def differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        wants_dx, wants_dweight, _ = ctx.needs_input_grad
        dx = product(dy, weight.mT, ends) if wants_dx else None
        return dx, outer(dy, x, ends) if wants_dweight else None, None

    product = opaque(f"grouped_linear_{name}", rows, _rows, flops=_multiplications)
    outer = opaque(f"grouped_linear_{name}_outer", matrices, _matrices, flops=_outer_multiplications)
    product.register_autograd(differentiate, setup_context=_save)

    def run(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return product(x, weight, ends)

    return run


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _rows(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1])


def _matrices(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), dy.shape[1], x.shape[1])


def _multiplications(x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * weight[1]


def _outer_multiplications(dy: tuple[int, ...], x: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * dy[1]
