"""RMSNorm on a GPU: one pass forward, one backward. Bound by memory: what counts is bytes in flight.

A program takes tiles of whole rows, some 8 to 16 KB each. Backward, a few programs per multiprocessor walk over all
rows and keep their share of the weight's gradient, summed up afterwards: nothing is added in an order that may change.

Shapes: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import gpu_of
from kernels.library import opaque
from kernels.tuned import launch

__all__ = ["rms_norm"]

TILE_BYTES = 8 * 1024
PROGRAMS_PER_SM = 4  # backward


def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Arguments and result as `reference`."""
    y, _ = _operation(x, weight, eps, out_dtype)
    return y


@triton.jit
def _forward_kernel(
    x,
    weight,
    y,
    rstd,
    rows,
    width,
    x_stride,
    eps,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 1) / width + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    values *= scale[:, None]
    if HAS_WEIGHT:
        values *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * width + column[None, :], values, mask=inside)


@triton.jit
def _backward_kernel(
    dy,
    x,
    weight,
    rstd,
    dx,
    dweight,
    rows,
    width,
    dy_stride,
    x_stride,
    tiles_per_program,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    if HAS_WEIGHT:
        gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        total = tl.zeros([WIDTH], tl.float32)
    for i in tl.range(0, tiles_per_program, num_stages=STAGES):
        row = (program * tiles_per_program + i) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        values *= scale[:, None]
        if HAS_WEIGHT:
            total += tl.sum(grad * values, 0)
            grad *= gain[None, :]
        mean = tl.sum(grad * values, 1) / width
        grad = (grad - values * mean[:, None]) * scale[:, None]
        tl.store(dx + row[:, None] * width + column[None, :], grad, mask=inside)
    if HAS_WEIGHT:
        tl.store(dweight + program * width + column, total, mask=column < width)


def _forward(x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., D) -> y (..., D), 1 / rms (N,) fp32."""
    flat, weight = _rows(x), _dense(weight)
    rows, width = flat.shape
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        chosen = _launch("rms_norm.forward", x, width)
        _forward_kernel[(triton.cdiv(rows, chosen["ROWS"]),)](
            flat, weight, y, rstd, rows, width, flat.stride(0), eps, HAS_WEIGHT=weight is not None, **chosen
        )
    return y, rstd


def _backward(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """-> dx like x, dweight (D,) fp32 (empty without a weight)."""
    flat, grad, weight = _rows(x), _rows(dy), _dense(weight)
    rows, width = flat.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chosen = _launch("rms_norm.backward", x, width)
    tiles = triton.cdiv(rows, chosen["ROWS"])
    gpu = gpu_of(x.device)
    programs = min(tiles, PROGRAMS_PER_SM * (gpu.sms if gpu else 1))
    partial = torch.empty(programs, width if weight is not None else 0, dtype=torch.float32, device=x.device)
    if rows:
        _backward_kernel[(programs,)](
            grad,
            flat,
            weight,
            rstd,
            dx,
            partial,
            rows,
            width,
            grad.stride(0),
            flat.stride(0),
            triton.cdiv(tiles, programs),
            HAS_WEIGHT=weight is not None,
            STAGES=chosen.pop("num_stages"),
            **chosen,
        )
    return dx, partial.sum(0)


def _rows(x: Tensor) -> Tensor:
    """(N, D) with neighbouring columns; a copy only where strides ask for one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _dense(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _launch(kernel: str, x: Tensor, width: int) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    row_bytes = block * x.element_size()
    rows = max(1, min(16, TILE_BYTES // row_bytes))
    warps = 4 if rows * block <= 4096 else 8
    default = {"ROWS": rows, "WIDTH": block, "num_warps": warps, "num_stages": 3}
    return launch(kernel, x.device, {"width": width, "dtype": str(x.dtype)}, default)


_operation = opaque(
    "rms_norm",
    _forward,
    lambda x, weight, eps, out_dtype: (
        torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[:-1].numel(), dtype=torch.float32),
    ),
    flops=lambda x, *args, **kwargs: 4 * x.numel(),
)
_gradients = opaque(
    "rms_norm_backward",
    _backward,
    lambda dy, x, weight, rstd: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(0 if weight is None else weight.shape[0], dtype=torch.float32),
    ),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = _gradients(dy, x, weight, rstd)
    return dx, None if weight is None else dweight.to(weight.dtype), None, None


_operation.register_autograd(_differentiate, setup_context=_save)
