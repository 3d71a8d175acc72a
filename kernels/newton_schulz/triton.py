"""Newton-Schulz on a GPU: two of the three products of a step are symmetric, and half of each is enough.

X X^T and b A + c A A^T are one kernel: a program multiplies one tile on or above the diagonal and stores it and its
mirror image. The third product and the division are torch's. The whole iteration is one operation: a launch costs the
host more than a small product the device.

Shapes: B matrices, s rows, k columns of the wide form (s <= k).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import device as devices
from kernels.library import opaque
from kernels.newton_schulz.coefficients import COEFFICIENTS
from kernels.newton_schulz.reference import divisors
from kernels.newton_schulz.work import operations
from kernels.tuned import launch

__all__ = ["newton_schulz"]

SMALL = 256  # rows up to which smaller tiles give more programs


def newton_schulz(matrices: Tensor, *, coefficients: str, steps: int, dtype: torch.dtype) -> Tensor:
    """Arguments and result as `reference`."""
    return _operation(matrices, coefficients, steps, dtype)


@triton.jit
def _symmetric_kernel(
    x,
    out,
    rows,
    columns,
    x_batch,
    x_row,
    x_column,
    alpha,
    beta,
    ADD_X: tl.constexpr,
    RAISE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One axis for all, tiles of a matrix together: the others of a grid end at 65,535.
    across = tl.cdiv(rows, BLOCK)
    tile = tl.program_id(0) % (across * across)
    tile_m, tile_n = tile // across, tile % across
    if tile_n < tile_m:  # the mirror image of one above the diagonal
        return
    matrix = (tl.program_id(0) // (across * across)).to(tl.int64)
    x += matrix * x_batch
    out += matrix * rows * rows
    m = tile_m.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tile_n.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    left = x + m[:, None] * x_row + k[None, :] * x_column  # (BLOCK, BLOCK_K)
    right = x + n[None, :] * x_row + k[:, None] * x_column  # (BLOCK_K, BLOCK)
    step = tl.full((), BLOCK_K, tl.int64) * x_column
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, columns, BLOCK_K):
        inside = k < columns - start
        a = tl.load(left, mask=(m < rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=(n < rows)[None, :] & inside[:, None], other=0.0)
        if RAISE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += step
        right += step
    total *= alpha
    inside = (m < rows)[:, None] & (n < rows)[None, :]
    if ADD_X:  # square then, and symmetric
        same = x + m[:, None] * x_row + n[None, :] * x_column
        total += beta * tl.load(same, mask=inside, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty)
    tl.store(out + m[:, None] * rows + n[None, :], total, mask=inside)
    if tile_m != tile_n:
        mirrored = (n < rows)[:, None] & (m < rows)[None, :]
        tl.store(out + n[:, None] * rows + m[None, :], tl.trans(total), mask=mirrored)


def _symmetric(x: Tensor, alpha: float = 1.0, beta: float | None = None) -> Tensor:
    """alpha X X^T, (B, s, k) -> (B, s, s), for X of any strides; with `beta` added beta X, for symmetric X."""
    batch, rows, columns = x.shape
    out = torch.empty(batch, rows, rows, dtype=x.dtype, device=x.device)
    chosen = _launch(x)
    across = triton.cdiv(rows, chosen["BLOCK"])
    _symmetric_kernel[(batch * across * across,)](
        x,
        out,
        rows,
        columns,
        *x.stride(),
        alpha,
        beta or 0.0,
        ADD_X=beta is not None,
        RAISE=devices.interpreting(),  # it multiplies the bits of bf16 as integers
        **chosen,
    )
    return out


def _iterate(matrices: Tensor, coefficients: str, steps: int, dtype: torch.dtype) -> Tensor:
    chosen = COEFFICIENTS[coefficients]
    x = torch.empty_like(matrices, dtype=dtype)
    torch.div(matrices, divisors(matrices, chosen), out=x)  # rounded once, without a copy in fp32
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    if x.numel():
        for a, b, c in chosen.polynomials(steps):
            polynomial = _symmetric(_symmetric(x), c, b)
            x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _launch(x: Tensor) -> dict[str, Any]:
    _, rows, columns = x.shape
    block = 64 if rows <= SMALL else 128
    default: dict[str, Any] = {
        "BLOCK": block,
        "BLOCK_K": 64,
        "num_warps": 4 if block == 64 else 8,
        "num_stages": 4,
    }
    if x.element_size() > 2:
        default |= {"BLOCK": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    key: dict[str, int | str] = {"rows": rows, "columns": columns, "dtype": str(x.dtype)}
    return launch(
        "newton_schulz.symmetric", x.device, key, default, {"BLOCK": (64, 128), "BLOCK_K": (32, 64, 128)}
    )


def _without_values(matrices: Tensor, coefficients: str, steps: int, dtype: torch.dtype) -> Tensor:
    batch, rows, columns = matrices.shape
    if rows > columns:
        return matrices.new_empty(batch, columns, rows, dtype=dtype).mT
    return matrices.new_empty(batch, rows, columns, dtype=dtype)


_operation = opaque(
    "newton_schulz",
    _iterate,
    _without_values,
    flops=lambda matrices, coefficients, steps, dtype, **kwargs: operations(*matrices, steps=steps),
)
