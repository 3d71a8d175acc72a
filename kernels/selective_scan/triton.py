"""The selective scan on a GPU, step by step: a program has some channels of a row, whose states never leave registers.

Forward writes the states down before every block of steps. Backward walks over blocks from the last on: it runs through
a block's steps once more to put the states before each of them into memory of its own, small enough for the L2 cache,
and comes back over them. Gradients that programs share are kept apart and summed up afterwards: nothing is added in an
order that may change.

    g_t = C_t dy_t + a_{t+1} g_{t+1},  a_t = exp(d_t A);  dB_t = sum over channels of d_t u_t g_t,  dC_t of dy_t h_t
    du_t = d_t (B_t g_t) + D dy_t;  dd_t = u_t (B_t g_t) + sum over states of A r_t;  dA = sum over steps of d_t r_t,
    where r_t = a_t h_{t-1} g_t

Shapes: B rows of T steps, E channels of N states each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.selective_scan.operation import Gradients, operation
from kernels.tuned import launch

__all__ = ["selective_scan"]

STEPS = 32  # of a block
LOG2_E = tl.constexpr(1.4426950408889634)
PLAIN_FROM = tl.constexpr(20.0)  # softplus(x) = x from here on, as torch has it


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), small values with all their digits."""
    power = tl.exp(tl.minimum(x, PLAIN_FROM))
    sum_ = 1.0 + power
    small = sum_ == 1.0
    found = tl.where(small, power, tl.log(sum_) * power / tl.where(small, 1.0, sum_ - 1.0))
    return tl.where(x > PLAIN_FROM, x, found)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _of_channels(t, strides, row, step, channel, inside):
    """t (B, T, E) at one step, in fp32."""
    at = t + row * strides[0] + step * strides[1] + channel * strides[2]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _decay(size, rate, reset, reset_strides, row, step, HAS_RESET: tl.constexpr):
    """exp(d A), 0 where a document begins; `rate` is A log2(e)."""
    decay = tl.exp2(size[:, None] * rate)
    if HAS_RESET:
        fresh = tl.load(reset + row * reset_strides[0] + step * reset_strides[1]) != 0
        decay = tl.where(fresh, 0.0, decay)
    return decay


@triton.jit
def _forward_kernel(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    initial,
    reset,
    y,
    final,
    kept,
    rows,
    steps,
    width,
    states,
    u_strides,
    delta_strides,
    B_strides,
    C_strides,
    z_strides,
    reset_strides,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_RESET: tl.constexpr,
    KEEP: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    state = tl.arange(0, STATES)
    inside, real = channel < width, state < states
    both = inside[:, None] & real[None, :]
    of_parameters = channel[:, None] * states + state[None, :]
    rate = tl.load(A + of_parameters, mask=both, other=0.0).to(tl.float32) * LOG2_E
    shift = tl.zeros([CHANNELS], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    past = tl.zeros([CHANNELS], tl.float32)
    if HAS_D:
        past = tl.load(D + channel, mask=inside, other=0.0).to(tl.float32)
    h = tl.zeros([CHANNELS, STATES], tl.float32)
    of_row = row * width * states + of_parameters
    if HAS_INITIAL:
        h = tl.load(initial + of_row, mask=both, other=0.0).to(tl.float32)
    for block in tl.range(0, tl.cdiv(steps, STEPS)):
        if KEEP:
            tl.store(kept + block * rows * width * states + of_row, h, mask=both)
        for i in tl.range(0, tl.minimum(STEPS, steps - block * STEPS)):
            step = row * 0 + block * STEPS + i
            value = _of_channels(u, u_strides, row, step, channel, inside)
            size = _softplus(_of_channels(delta, delta_strides, row, step, channel, inside) + shift)
            into = _of_channels(B, B_strides, row, step, state, real)
            out = _of_channels(C, C_strides, row, step, state, real)
            decay = _decay(size, rate, reset, reset_strides, row, step, HAS_RESET)
            h = decay * h + (size * value)[:, None] * into[None, :]
            result = tl.sum(h * out[None, :], 1) + past * value
            if HAS_Z:
                gate = _of_channels(z, z_strides, row, step, channel, inside)
                result *= gate * _sigmoid(gate)
            tl.store(y + (row * steps + step) * width + channel, result, mask=inside)
    tl.store(final + of_row, h, mask=both)


@triton.jit
def _backward_kernel(
    dy,
    dfinal,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    reset,
    kept,
    before,
    du,
    ddelta,
    dA,
    dB,
    dC,
    dD,
    dz,
    dbias,
    dinitial,
    rows,
    steps,
    width,
    states,
    dy_strides,
    u_strides,
    delta_strides,
    B_strides,
    C_strides,
    z_strides,
    reset_strides,
    HAS_FINAL: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_RESET: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    """dA (B, E, N), dD and dbias (B, E), dB and dC (E / CHANNELS, B, T, N): each program's share. before (E / CHANNELS,
    B, STEPS, CHANNELS, STATES): states before each step of a block."""
    tile, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)
    state = tl.arange(0, STATES)
    inside, real = channel < width, state < states
    both = inside[:, None] & real[None, :]
    of_parameters = channel[:, None] * states + state[None, :]
    of_row = row * width * states + of_parameters
    own = before + (tile * rows + row) * STEPS * CHANNELS * STATES
    own += tl.arange(0, CHANNELS)[:, None] * STATES + state[None, :]
    rate = tl.load(A + of_parameters, mask=both, other=0.0).to(tl.float32) * LOG2_E
    shift = tl.zeros([CHANNELS], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    past = tl.zeros([CHANNELS], tl.float32)
    if HAS_D:
        past = tl.load(D + channel, mask=inside, other=0.0).to(tl.float32)
    g = tl.zeros([CHANNELS, STATES], tl.float32)
    if HAS_FINAL:
        g = tl.load(dfinal + of_row, mask=both, other=0.0).to(tl.float32)
    of_rates = tl.zeros([CHANNELS, STATES], tl.float32)
    of_past = tl.zeros([CHANNELS], tl.float32)
    of_shift = tl.zeros([CHANNELS], tl.float32)
    blocks = tl.cdiv(steps, STEPS)
    for number in tl.range(0, blocks):
        block = blocks - 1 - number
        count = tl.minimum(STEPS, steps - block * STEPS)
        h = tl.load(kept + block * rows * width * states + of_row, mask=both, other=0.0).to(tl.float32)
        for i in tl.range(0, count):
            step = row * 0 + block * STEPS + i
            tl.store(own + i * CHANNELS * STATES, h)
            value = _of_channels(u, u_strides, row, step, channel, inside)
            size = _softplus(_of_channels(delta, delta_strides, row, step, channel, inside) + shift)
            into = _of_channels(B, B_strides, row, step, state, real)
            decay = _decay(size, rate, reset, reset_strides, row, step, HAS_RESET)
            h = decay * h + (size * value)[:, None] * into[None, :]
        tl.debug_barrier()  # a thread may read what another wrote
        for j in tl.range(0, count):
            i = count - 1 - j
            step = row * 0 + block * STEPS + i
            value = _of_channels(u, u_strides, row, step, channel, inside)
            raw = _of_channels(delta, delta_strides, row, step, channel, inside) + shift
            into = _of_channels(B, B_strides, row, step, state, real)
            out = _of_channels(C, C_strides, row, step, state, real)
            grad = _of_channels(dy, dy_strides, row, step, channel, inside)
            size = _softplus(raw)
            left = _decay(size, rate, reset, reset_strides, row, step, HAS_RESET)
            at = (row * steps + step) * width + channel
            remains = left * tl.load(own + i * CHANNELS * STATES)  # of the states before
            h = remains + (size * value)[:, None] * into[None, :]
            if HAS_Z:
                gate = _of_channels(z, z_strides, row, step, channel, inside)
                share = _sigmoid(gate)
                result = tl.sum(h * out[None, :], 1) + past * value
                tl.store(dz + at, grad * result * share * (1.0 + gate * (1.0 - share)), mask=inside)
                grad *= gate * share
            g += grad[:, None] * out[None, :]
            shares = ((tile * rows + row) * steps + step) * states + state
            tl.store(dC + shares, tl.sum(grad[:, None] * h, 0), mask=real)
            tl.store(dB + shares, tl.sum(g * (size * value)[:, None], 0), mask=real)
            reached = tl.sum(g * into[None, :], 1)
            tl.store(du + at, size * reached + past * grad, mask=inside)
            remains *= g
            of_rates += remains * size[:, None]
            dsize = value * reached + tl.sum(remains * rate, 1) / LOG2_E
            draw = dsize * tl.where(raw > PLAIN_FROM, 1.0, _sigmoid(raw))
            tl.store(ddelta + at, draw, mask=inside)
            of_shift += draw
            of_past += grad * value
            g *= left
        tl.debug_barrier()
    tl.store(dA + of_row, of_rates, mask=both)
    if HAS_D:
        tl.store(dD + row * width + channel, of_past, mask=inside)
    if HAS_BIAS:
        tl.store(dbias + row * width + channel, of_shift, mask=inside)
    if HAS_INITIAL:
        tl.store(dinitial + of_row, g, mask=both)


def _forward(y: Tensor, final: Tensor, kept: Tensor, *given: Tensor | None) -> None:
    u, _, A, *_ = given
    assert u is not None and A is not None
    if not u.numel():
        _without_steps(final, given[8])
        return
    chosen = _launch("selective_scan.forward", u, A, 64)
    _forward_kernel[_grid(u, chosen)](
        *_dense(given),
        y,
        final,
        kept,
        *_sizes(u, A),
        *_strides(given),
        **_has(given),
        KEEP=kept.numel() > 0,
        **chosen,
    )


def _backward(made: Gradients, dy: Tensor, dfinal: Tensor | None, *given_and_kept: Tensor | None) -> None:
    *given, kept = given_and_kept
    u, _, A, *_ = given
    assert u is not None and A is not None and kept is not None
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = made
    if not u.numel():
        for grad in made:
            grad.zero_()
        if dfinal is not None and dinitial.numel():
            dinitial.copy_(dfinal)
        return
    chosen = _launch("selective_scan.backward", u, A, 32)
    (rows, steps, width, states), grid = _sizes(u, A), _grid(u, chosen)

    def shares(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    of_rates, of_past, of_shift = shares(rows, width, states), shares(rows, width), shares(rows, width)
    of_B, of_C = (shares(grid[0], rows, steps, states) for _ in range(2))
    before = shares(grid[0], rows, STEPS, chosen["CHANNELS"], chosen["STATES"])
    inputs = _dense(given)
    del inputs[8]  # the states before the first step are those kept of the first block
    _backward_kernel[grid](
        dy,
        None if dfinal is None else dfinal.contiguous(),
        *inputs,
        kept,
        before,
        du,
        ddelta,
        of_rates,
        of_B,
        of_C,
        of_past,
        dz,
        of_shift,
        dinitial,
        *_sizes(u, A),
        dy.stride(),
        *_strides(given),
        HAS_FINAL=dfinal is not None,
        **_has(given),
        **chosen,
    )
    for grad, parts in ((dA, of_rates), (dB, of_B), (dC, of_C), (dD, of_past), (dbias, of_shift)):
        if grad.numel():
            grad.copy_(parts.sum(0))


def _without_steps(final: Tensor, initial: Tensor | None) -> None:
    final.zero_() if initial is None else final.copy_(initial)


def _launch(kernel: str, u: Tensor, A: Tensor, channels: int) -> dict[str, Any]:
    width, states = A.shape
    default = {"CHANNELS": min(channels, triton.next_power_of_2(width)), "num_warps": 4}
    key: dict[str, int | str] = {"width": width, "states": states, "dtype": str(u.dtype)}
    chosen = launch(kernel, u.device, key, default, {"CHANNELS": (16, 32, 64)})
    return {**chosen, "STEPS": STEPS, "STATES": triton.next_power_of_2(states)}


def _grid(u: Tensor, chosen: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(u.shape[2], chosen["CHANNELS"]), len(u)


def _sizes(u: Tensor, A: Tensor) -> tuple[int, int, int, int]:
    return *u.shape, A.shape[1]  # type: ignore[return-value]


def _dense(given: Any) -> list[Tensor | None]:
    """Parameters and states contiguous; inputs of steps as they are, with their strides."""
    u, delta, A, B, C, D, z, bias, initial, reset = given
    small = (None if t is None else t.contiguous() for t in (A, D, bias, initial))
    A, D, bias, initial = small
    return [u, delta, A, B, C, D, z, bias, initial, reset]


def _strides(given: Any) -> list[tuple[int, ...]]:
    u, delta, _, B, C, _, z, _, _, reset = given
    return [t.stride() for t in (u, delta, B, C)] + [
        (0, 0, 0) if z is None else z.stride(),
        (0, 0) if reset is None else reset.stride(),
    ]


def _has(given: Any) -> dict[str, bool]:
    _, _, _, _, _, D, z, bias, initial, reset = (t is not None for t in given)
    return {"HAS_D": D, "HAS_Z": z, "HAS_BIAS": bias, "HAS_INITIAL": initial, "HAS_RESET": reset}


def _kept_shape(batch: int, length: int, width: int, states: int) -> tuple[int, ...]:
    return triton.cdiv(length, STEPS), batch, width, states


selective_scan = operation("triton", _forward, _backward, _kept_shape)
