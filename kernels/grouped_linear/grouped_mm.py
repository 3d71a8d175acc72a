"""The product of groups by `torch.nn.functional.grouped_mm`, in one call and without waiting for the bounds of groups.

As an operation of ours, because torch's own (2.11 to 2.13) has no shapes in fp32 for the compiler, counts no FLOPs,
refuses rows that are no multiple of 16 bytes (odd widths, a gradient of `.sum()`), and on some GPUs leaves rubbish in
the gradient of a matrix that no row chose. On a CPU, where torch walks over the groups, it is `by_groups`.

Shapes: M rows in E groups, K columns in, N columns out.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kernels.grouped_linear import by_groups
from kernels.library import opaque

__all__ = ["grouped_mm"]

ALIGNMENT = 16  # bytes, of addresses and rows


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Arguments and result as `reference`. Rows behind the last group would not be written."""
    return _product(x, weight, ends)


def aligned(t: Tensor) -> Tensor:
    """t (..., m, n) as it is where `grouped_mm` reads it so: rows or columns dense, the other stride and the address a
    multiple of 16 bytes; else a copy whose rows begin on such."""
    unit = ALIGNMENT // t.element_size()
    (rows, columns), (m, n) = t.stride()[-2:], t.shape[-2:]
    dense = (columns == 1 and rows >= n and rows % unit == 0) or (
        rows == 1 and columns >= m and columns % unit == 0
    )
    if dense and all(stride % unit == 0 for stride in t.stride()[:-2]) and t.data_ptr() % ALIGNMENT == 0:
        return t
    padded = t.new_empty(*t.shape[:-1], -(-n // unit) * unit)
    return padded[..., :n].copy_(t)


def _multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if not len(x):
        return x.new_empty(0, weight.shape[1])
    if x.device.type == "cpu":
        return by_groups.multiply(x, weight, ends)
    return F.grouped_mm(aligned(x), aligned(weight).mT, offs=ends.contiguous()).contiguous()


def _multiply_outer(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dy (M, N), x (M, K) -> (E, N, K): dy^T x of every group, 0 where it is empty."""
    if not len(x):
        return x.new_zeros(len(ends), dy.shape[1], x.shape[1])
    if x.device.type == "cpu":
        return by_groups.multiply_outer(dy, x, ends)
    products = F.grouped_mm(aligned(dy).mT, aligned(x), offs=ends.contiguous()).contiguous()
    empty = ends.diff(prepend=ends.new_zeros(1)) == 0
    return products.masked_fill_(empty[:, None, None], 0)


def _rows(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1])


def _matrices(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), dy.shape[1], x.shape[1])


def _multiplications(x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * weight[1]


def _outer_multiplications(dy: tuple[int, ...], x: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * dy[1]


_product = opaque("grouped_linear", _multiply, _rows, flops=_multiplications)
_outer = opaque("grouped_linear_outer", _multiply_outer, _matrices, flops=_outer_multiplications)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    wants_dx, wants_dweight, _ = ctx.needs_input_grad
    dx = _product(dy, weight.mT, ends) if wants_dx else None
    return dx, _outer(dy, x, ends) if wants_dweight else None, None


_product.register_autograd(_differentiate, setup_context=_save)
