"""The recurrence on a GPU: x read once, y written once. A program walks over the steps of some channels, a tile of them
at a time, which `tl.associative_scan` joins; what enters the next tile stays in registers.

Where rows and channels make too few programs for a GPU, time is cut into segments besides: a first pass computes what
each segment adds, the same recurrence over segments what enters each, and the pass above starts from there.

    g_t = dy_t + decay_{t+1} g_{t+1};  dx = g;  ddecay_t = sum over D of g_t y_{t-1}

Shapes: B rows, T steps, D channels, S segments of L steps.
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

__all__ = ["linear_scan"]

SMALLEST_SEGMENT = 256  # steps


def linear_scan(x: Tensor, decay: Tensor, initial: Tensor | None) -> Tensor:
    """Arguments and result as `reference`."""
    return _operation(x, decay, initial)


@triton.jit
def _joined(left_decay, left, right_decay, right):
    """Two neighbouring stretches of steps as one: what is left behind it, and what it adds."""
    return left_decay * right_decay, right_decay * left + right


@triton.jit
def _forward_kernel(
    x,
    decay,
    initial,
    y,
    steps,
    width,
    segments,
    segment,
    x_strides,
    decay_strides,
    HAS_INITIAL: tl.constexpr,
    ENDS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y (B, T, D), or what is behind each segment that starts from 0, (B, S, D), if ENDS. initial (B, S, D)."""
    row = (tl.program_id(1) // segments).to(tl.int64)
    part = (tl.program_id(1) % segments).to(tl.int64)
    channels = tl.program_id(0).to(tl.int64)
    column = channels * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    state = tl.zeros([WIDTH], tl.float32)
    at = (row * segments + part) * width + column
    if HAS_INITIAL:
        state = tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    first = part * segment
    last = tl.minimum(first + segment, steps)
    for i in tl.range(0, tl.cdiv(last - first, STEPS)):
        step = first + i * STEPS + tl.arange(0, STEPS)
        there = (step < last)[:, None] & inside[None, :]
        left = tl.load(decay + row * decay_strides[0] + step * decay_strides[1], mask=step < last, other=1.0)
        values = tl.load(
            x + row * x_strides[0] + step[:, None] * x_strides[1] + column[None, :] * x_strides[2],
            mask=there,
            other=0.0,
        ).to(tl.float32)
        lefts = tl.broadcast_to(left.to(tl.float32)[:, None], (STEPS, WIDTH))
        lefts, values = tl.associative_scan((lefts, values), 0, _joined)
        values += lefts * state[None, :]
        if not ENDS:
            tl.store(y + (row * steps + step)[:, None] * width + column[None, :], values, mask=there)
        state = tl.sum(tl.where((tl.arange(0, STEPS) == STEPS - 1)[:, None], values, 0.0), 0)
    if ENDS:
        tl.store(y + at, state, mask=inside)


@triton.jit
def _backward_kernel(
    dy,
    decay,
    initial,
    y,
    entering,
    dx,
    ddecay,
    steps,
    width,
    rows,
    segments,
    segment,
    dy_strides,
    decay_strides,
    HAS_INITIAL: tl.constexpr,
    HAS_ENTERING: tl.constexpr,
    ENDS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """From the last step on. dx (B, T, D), or g at the first step of each segment as if nothing came behind it,
    (B, S, D), if ENDS; ddecay (D / WIDTH, B, T): each program's channels. entering (B, S, D): g behind each segment."""
    row = (tl.program_id(1) // segments).to(tl.int64)
    part = (tl.program_id(1) % segments).to(tl.int64)
    channels = tl.program_id(0).to(tl.int64)
    column = channels * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    at = (row * segments + part) * width + column
    state = tl.zeros([WIDTH], tl.float32)
    if HAS_ENTERING:
        state = tl.load(entering + at, mask=inside, other=0.0)
    first = part * segment
    last = tl.minimum(first + segment, steps)
    tiles = tl.cdiv(last - first, STEPS)
    for i in tl.range(0, tiles):
        step = first + (tiles - 1 - i) * STEPS + tl.arange(0, STEPS)
        there = (step < last)[:, None] & inside[None, :]
        # The decay of the step behind; behind the last of all nothing comes.
        left = tl.load(
            decay + row * decay_strides[0] + (step + 1) * decay_strides[1],
            mask=(step < last) & (step + 1 < steps),
            other=1.0,
        ).to(tl.float32)
        grads = tl.load(
            dy + row * dy_strides[0] + step[:, None] * dy_strides[1] + column[None, :] * dy_strides[2],
            mask=there,
            other=0.0,
        ).to(tl.float32)
        lefts = tl.broadcast_to(left[:, None], (STEPS, WIDTH))
        lefts, grads = tl.associative_scan((lefts, grads), 0, _joined, reverse=True)
        grads += lefts * state[None, :]
        state = tl.sum(tl.where((tl.arange(0, STEPS) == 0)[:, None], grads, 0.0), 0)
        if not ENDS:
            tl.store(dx + (row * steps + step)[:, None] * width + column[None, :], grads, mask=there)
            before = tl.load(
                y + (row * steps + step - 1)[:, None] * width + column[None, :],
                mask=there & (step > 0)[:, None],
                other=0.0,
            ).to(tl.float32)
            if HAS_INITIAL:
                start = tl.load(initial + row * width + column, mask=inside, other=0.0).to(tl.float32)
                before += tl.where((step == 0)[:, None], start[None, :], 0.0)
            share = ddecay + (channels * rows + row) * steps + step
            tl.store(share, tl.sum(tl.where(there, grads * before, 0.0), 1), mask=step < last)
    if ENDS:
        tl.store(dx + at, state, mask=inside)


def _forward(x: Tensor, decay: Tensor, initial: Tensor | None) -> Tensor:
    y = _like(x, decay, initial)
    if not y.numel():
        return y
    chosen, segments, length = _cut("linear_scan.forward", x)

    def run(out: Tensor, entering: Tensor | None, ends: bool) -> None:
        _forward_kernel[(triton.cdiv(x.shape[2], chosen["WIDTH"]), len(x) * segments)](
            x,
            decay,
            entering,
            out,
            x.shape[1],
            x.shape[2],
            segments,
            length,
            x.stride(),
            decay.stride(),
            HAS_INITIAL=entering is not None,
            ENDS=ends,
            **chosen,
        )

    if segments == 1:
        run(y, None if initial is None else initial.contiguous(), False)
        return y
    added = _of_segments(x, segments)
    run(added, None, True)
    behind = _forward(added, _products(decay, segments, length), initial)  # each segment
    first = torch.zeros_like(behind[:, 0]) if initial is None else initial.to(behind.dtype)
    run(y, torch.cat((first[:, None], behind[:, :-1]), dim=1), False)
    return y


def _backward(dy: Tensor, decay: Tensor, initial: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
    """-> dx like y, ddecay (B, T) fp32."""
    dx, ddecay = _gradients(dy, decay, initial, y)
    if not dx.numel():
        return dx, ddecay.zero_()
    rows, steps, width = y.shape
    chosen, segments, length = _cut("linear_scan.backward", y)
    parts = triton.cdiv(width, chosen["WIDTH"])
    shares = ddecay.new_empty(parts, *ddecay.shape)

    def run(out: Tensor, entering: Tensor | None, ends: bool) -> None:
        _backward_kernel[(parts, rows * segments)](
            dy,
            decay,
            None if initial is None else initial.contiguous(),
            y,
            entering,
            out,
            shares,
            steps,
            width,
            rows,
            segments,
            length,
            dy.stride(),
            decay.stride(),
            HAS_INITIAL=initial is not None,
            HAS_ENTERING=entering is not None,
            ENDS=ends,
            **chosen,
        )

    if segments == 1:
        run(dx, None, False)
        return dx, shares.sum(0)
    added = _of_segments(y, segments)
    run(added, None, True)
    later = torch.cat((decay[:, 1:], decay.new_zeros(rows, 1)), dim=1)  # of the step behind
    at_first = _forward(added.flip(1), _products(later, segments, length).flip(1), None).flip(1)
    run(dx, torch.cat((at_first[:, 1:], torch.zeros_like(at_first[:, :1])), dim=1), False)
    return dx, shares.sum(0)


def _cut(kernel: str, x: Tensor) -> tuple[dict[str, Any], int, int]:
    """How a kernel is launched, and S segments of L steps, the last one shorter: as many as there are multiprocessors
    for."""
    rows, steps, width = x.shape
    default = {"STEPS": 32, "WIDTH": min(64, triton.next_power_of_2(width)), "num_warps": 4}
    vary = {"STEPS": (16, 32, 64), "WIDTH": (32, 64, 128)}
    chosen = launch(kernel, x.device, {"steps": steps, "width": width, "dtype": str(x.dtype)}, default, vary)
    gpu = gpu_of(x.device)
    free = (gpu.sms if gpu else 1) // (rows * triton.cdiv(width, chosen["WIDTH"]))
    segments = max(1, min(free, steps // SMALLEST_SEGMENT))
    length = triton.cdiv(triton.cdiv(steps, segments), chosen["STEPS"]) * chosen["STEPS"]
    return chosen, triton.cdiv(steps, length), length


def _of_segments(x: Tensor, segments: int) -> Tensor:
    """(B, S, D)."""
    return torch.empty(x.shape[0], segments, x.shape[2], dtype=torch.float32, device=x.device)


def _products(decay: Tensor, segments: int, length: int) -> Tensor:
    """decay (B, T) -> what is left behind each segment, (B, S)."""
    missing = segments * length - decay.shape[1]
    filled = torch.cat((decay, decay.new_ones(len(decay), missing)), dim=1)
    return filled.unflatten(1, (segments, length)).float().prod(-1)


def _like(x: Tensor, decay: Tensor, initial: Tensor | None) -> Tensor:
    """What `_forward` returns, without values."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _gradients(dy: Tensor, decay: Tensor, initial: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
    """What `_backward` returns, without values."""
    return (
        torch.empty(y.shape, dtype=y.dtype, device=y.device),
        torch.empty(decay.shape, dtype=torch.float32, device=y.device),
    )


def _flops(x: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * x[2]


_operation = opaque("linear_scan", _forward, _like, flops=_flops)
_differentiated = opaque(
    "linear_scan_backward", _backward, _gradients, flops=lambda dy, *a, **k: 2 * _flops(dy)
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, decay, initial = inputs
    ctx.save_for_backward(decay, initial, output)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    decay, initial, y = ctx.saved_tensors
    dx, ddecay = _differentiated(dy, decay, initial, y)
    if initial is None:
        return dx, ddecay.to(decay.dtype), None
    dinitial = decay[:, :1] * dx[:, 0] if dx.numel() else torch.zeros_like(initial)
    return dx, ddecay.to(decay.dtype), dinitial.to(initial.dtype)


_operation.register_autograd(_differentiate, setup_context=_save)
