"""Small kernels that can be wrong in several ways: what the harness has to notice."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["added_kernel", "doubled_kernel", "sums_kernel"]


@triton.jit
def sums_kernel(x, out, width, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr, FILLED: tl.constexpr):
    """Sums of rows, with an offset in 32 bits, or a load of lanes that hold nothing."""
    row = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    column = tl.arange(0, BLOCK)
    if FILLED:
        values = tl.load(x + row * stride + column, mask=column < width, other=0.0)
    else:
        values = tl.load(x + row * stride + column, mask=column < width)
    tl.store(out + row, tl.sum(values, 0))


@triton.jit
def doubled_kernel(x, out, numel, BLOCK: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr):
    """Blocks that overlap where STEP < BLOCK, leave gaps where it is larger, and end behind the tensor."""
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    mask = (at < numel) | (not MASKED)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < numel, other=0.0), mask=mask)


@triton.jit
def added_kernel(x, out, BLOCK: tl.constexpr):
    """Sums of columns, added up in any order."""
    column = tl.arange(0, BLOCK)
    tl.atomic_add(out + column, tl.load(x + tl.program_id(0) * BLOCK + column))
