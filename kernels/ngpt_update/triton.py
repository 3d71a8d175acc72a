"""nGPT's step on a GPU: hidden state and branch read once, the new state written once; tiles as in
kernels/row_norms.py.

    n = branch * inner;  z = h + alpha * (n - h);  y = z * outer;  inner = 1 / ||branch||, outer = 1 / ||z||

Shapes: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.library import opaque
from kernels.row_norms import TILE_BYTES, launch_of, programs_of, rows_of

__all__ = ["ngpt_update"]

SHORTEST = tl.constexpr(1e-24)  # squared length of what has no direction


def ngpt_update(h: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
    """Arguments and result as `reference`."""
    return _operation(h, branch, alpha)[0]


@triton.jit
def _forward_kernel(
    h,
    branch,
    alpha,
    y,
    inner,
    outer,
    rows,
    width,
    h_stride,
    branch_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    state = tl.load(h + row[:, None] * h_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    added = tl.load(branch + row[:, None] * branch_stride + column[None, :], mask=inside, other=0.0)
    added = added.to(tl.float32)
    step = tl.load(alpha + column, mask=column < width, other=0.0).to(tl.float32)
    factor = 1 / tl.sqrt(tl.sum(added * added, 1) + SHORTEST)
    tl.store(inner + row, factor, mask=row < rows)
    state += step[None, :] * (added * factor[:, None] - state)
    factor = 1 / tl.sqrt(tl.sum(state * state, 1) + SHORTEST)
    tl.store(outer + row, factor, mask=row < rows)
    tl.store(y + row[:, None] * width + column[None, :], state * factor[:, None], mask=inside)


@triton.jit
def _backward_kernel(
    dy,
    h,
    branch,
    alpha,
    inner,
    outer,
    dh,
    dbranch,
    dalpha,
    rows,
    width,
    dy_stride,
    h_stride,
    branch_stride,
    tiles,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    step = tl.load(alpha + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([WIDTH], tl.float32)
    for i in tl.range(0, tiles, num_stages=STAGES):
        row = (program * tiles + i) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        grad = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        state = tl.load(h + row[:, None] * h_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        added = tl.load(branch + row[:, None] * branch_stride + column[None, :], mask=inside, other=0.0)
        to_unit = tl.load(inner + row, mask=row < rows, other=0.0)[:, None]
        scale = tl.load(outer + row, mask=row < rows, other=0.0)[:, None]
        added = added.to(tl.float32) * to_unit
        moved = added - state
        new = (state + step * moved) * scale
        grad = (grad - new * tl.sum(grad * new, 1)[:, None]) * scale
        total += tl.sum(grad * moved, 0)
        tl.store(dh + row[:, None] * width + column[None, :], grad * (1 - step), mask=inside)
        grad *= step
        grad = (grad - added * tl.sum(grad * added, 1)[:, None]) * to_unit
        tl.store(dbranch + row[:, None] * width + column[None, :], grad, mask=inside)
    tl.store(dalpha + program * width + column, total, mask=column < width)


def _forward(h: Tensor, branch: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> y like h, 1 / ||branch|| and 1 / ||z|| (N,) fp32."""
    y, inner, outer = _outputs(h, branch, alpha)
    if y.numel():
        flat, added, width = rows_of(h), rows_of(branch), h.shape[-1]
        chosen = launch_of("ngpt_update.forward", h, width, TILE_BYTES // 2, 16)
        _forward_kernel[(triton.cdiv(len(flat), chosen["ROWS"]),)](
            flat,
            added,
            alpha.contiguous(),
            y,
            inner,
            outer,
            len(flat),
            width,
            flat.stride(0),
            added.stride(0),
            **chosen,
        )
    return y, inner, outer


def _backward(
    dy: Tensor, h: Tensor, branch: Tensor, alpha: Tensor, inner: Tensor, outer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dh, dbranch, dalpha (D,) fp32."""
    dh, dbranch, dalpha = _gradients(dy, h, branch, alpha, inner, outer)
    if not dh.numel():
        return dh, dbranch, dalpha.zero_()
    grad, flat, added, width = rows_of(dy), rows_of(h), rows_of(branch), h.shape[-1]
    chosen = launch_of("ngpt_update.backward", h, width, TILE_BYTES // 2, 16)
    tiles = triton.cdiv(len(flat), chosen["ROWS"])
    programs = programs_of(h.device, tiles)
    shares = dalpha.new_empty(programs, width)
    _backward_kernel[(programs,)](
        grad,
        flat,
        added,
        alpha.contiguous(),
        inner,
        outer,
        dh,
        dbranch,
        shares,
        len(flat),
        width,
        grad.stride(0),
        flat.stride(0),
        added.stride(0),
        triton.cdiv(tiles, programs),
        STAGES=chosen.pop("num_stages"),
        **chosen,
    )
    return dh, dbranch, shares.sum(0)


def _outputs(h: Tensor, branch: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `_forward` returns, without values."""
    rows = h.shape[:-1].numel()
    inner, outer = (torch.empty(rows, dtype=torch.float32, device=h.device) for _ in range(2))
    return torch.empty(h.shape, dtype=h.dtype, device=h.device), inner, outer


def _gradients(
    dy: Tensor, h: Tensor, branch: Tensor, alpha: Tensor, inner: Tensor, outer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_backward` returns, without values."""
    return (
        torch.empty(h.shape, dtype=h.dtype, device=h.device),
        torch.empty(branch.shape, dtype=branch.dtype, device=h.device),
        torch.empty(alpha.shape, dtype=torch.float32, device=h.device),
    )


_operation = opaque("ngpt_update", _forward, _outputs, flops=lambda h, *args, **kwargs: 9 * h.numel())
_differentiated = opaque("ngpt_update_backward", _backward, _gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    h, branch, alpha, inner, outer = ctx.saved_tensors
    dh, dbranch, dalpha = _differentiated(dy, h, branch, alpha, inner, outer)
    return dh, dbranch, dalpha.to(alpha.dtype)


_operation.register_autograd(_differentiate, setup_context=_save)
