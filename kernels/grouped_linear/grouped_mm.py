"""The product of groups by `torch.nn.functional.grouped_mm`, in one call and without waiting for the bounds of groups.

As an operation of ours, because torch's own (2.11 to 2.13) has no shapes in fp32 for the compiler, counts no FLOPs,
refuses rows that are no multiple of 16 bytes (odd widths, a gradient of `.sum()`), and on some GPUs leaves rubbish in
the gradient of a matrix that no row chose.

Shapes: M rows in E groups, K columns in, N columns out.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.grouped_linear.operation import operation

__all__ = ["grouped_mm"]

ALIGNMENT = 16  # bytes, of addresses and rows


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


def multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (M, K), weight (E, N, K) -> (M, N). Rows behind the last group would not be written."""
    # Where the host would not have to wait for it.
    assert ends.device.type != "cpu" or ends[-1] == len(x), f"groups end at row {ends[-1]} of {len(x)}"
    return F.grouped_mm(aligned(x), aligned(weight).mT, offs=ends.contiguous()).contiguous()


def multiply_outer(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dy (M, N), x (M, K) -> (E, N, K), 0 where a group is empty."""
    products = F.grouped_mm(aligned(dy).mT, aligned(x), offs=ends.contiguous()).contiguous()
    empty = ends.diff(prepend=ends.new_zeros(1)) == 0
    return products.masked_fill_(empty[:, None, None], 0)


grouped_mm = operation("grouped_mm", multiply, multiply_outer)
