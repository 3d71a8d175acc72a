"""The product of groups on a CPU, one after another, as `grouped_mm` of torch does there too: here in few shapes.

oneDNN, which multiplies bf16 and fp16 there, makes a program for every shape that it meets, and groups have other
numbers of rows in every step: 32 groups of some 900 rows x 192 -> 64 in bf16 took 39 ms forward and 127 for the
gradient of the matrices, 3 and 5 in multiples of 64 rows (one core of an EPYC with AVX512-BF16, torch 2.13; fp32,
which it does not do, 11 and 9).

Shapes: M rows in E groups, K columns in, N columns out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.grouped_linear.operation import operation

__all__ = ["by_groups"]

STEP = {torch.bfloat16: 64, torch.float16: 64}  # multiples of rows, by dtype; else 1


def multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (M, K), weight (E, N, K) -> (M, N)."""
    out = x.new_empty(len(x), weight.shape[1])
    for group, start, end in _groups(ends, len(x)):
        length = _in_steps(end - start, x.dtype)
        # Rows behind the group are other groups' own: multiplied and left out.
        out[start:end] = (_filled(x[start : start + length], length) @ weight[group].mT)[: end - start]
    return out


def multiply_outer(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dy (M, N), x (M, K) -> (E, N, K), 0 where a group is empty."""
    out = x.new_zeros(len(ends), dy.shape[1], x.shape[1])
    for group, start, end in _groups(ends, len(x)):
        length = _in_steps(end - start, x.dtype)
        out[group] = _filled(dy[start:end], length).mT @ _filled(x[start:end], length)
    return out


def _groups(ends: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """(group, first row, row behind the last) of those that have any."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            yield group, start, end
        start = end
    assert start == rows, f"groups end at row {start} of {rows}"


def _in_steps(rows: int, dtype: torch.dtype) -> int:
    step = STEP.get(dtype, 1)
    return -(-rows // step) * step


def _filled(rows: Tensor, length: int) -> Tensor:
    """With zeros behind them, `length` in all."""
    return rows if len(rows) == length else F.pad(rows, (0, 0, 0, length - len(rows)))


by_groups = operation("by_groups", multiply, multiply_outer)
