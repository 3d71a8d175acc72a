"""The convolution on a GPU: each program a tile of tokens and channels, whose taps find all but the first of their
inputs in the cache. The backward pass computes the sums before silu again; gradients of taps and bias are summed up by
tile, and the tiles afterwards, so that nothing is added in an order that may change.

Shapes: B rows, T tokens, E channels, k taps.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.causal_conv1d.operation import Gradients, operation
from kernels.tuned import launch

__all__ = ["causal_conv1d"]


@triton.jit
def _run_of(run, row, token, tokens, HAS_RUN: tl.constexpr):
    """The document of tokens of a row: 0 for those before the first, -1 behind the last."""
    found = tl.where(token < tokens, 0, -1)
    if HAS_RUN:
        inside = (token >= 0) & (token < tokens)
        found = tl.where(inside, tl.load(run + row * tokens + token, mask=inside, other=0), found)
    return found


@triton.jit
def _seen(
    x,
    initial,
    run,
    row,
    token,
    from_run,
    column,
    tokens,
    width,
    x_strides,
    HAS_INITIAL: tl.constexpr,
    HAS_RUN: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Inputs of these tokens as one of `from_run` sees them: 0 of another document."""
    same = (_run_of(run, row, token, tokens, HAS_RUN) == from_run)[:, None] & (column < width)[None, :]
    at = x + row * x_strides[0] + token[:, None] * x_strides[1] + column[None, :] * x_strides[2]
    inside = (token >= 0) & (token < tokens)
    value = tl.load(at, mask=same & inside[:, None], other=0.0).to(tl.float32)
    if HAS_INITIAL:
        past = token + (TAPS - 1)
        before = (past >= 0) & (token < 0)
        at = initial + (row * (TAPS - 1) + past[:, None]) * width + column[None, :]
        value += tl.load(at, mask=same & before[:, None], other=0.0).to(tl.float32)
    return value


@triton.jit
def _total(
    x,
    weight,
    bias,
    initial,
    run,
    row,
    token,
    own,
    column,
    tokens,
    width,
    x_strides,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_RUN: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What silu is taken of, of tokens of the documents `own`."""
    inside = column < width
    total = tl.zeros([STEPS, WIDTH], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(TAPS):
        tap = tl.load(weight + column * TAPS + j, mask=inside, other=0.0).to(tl.float32)
        source = token - (TAPS - 1 - j)
        total += tap[None, :] * _seen(
            x, initial, run, row, source, own, column, tokens, width, x_strides, HAS_INITIAL, HAS_RUN, TAPS
        )
    return total


@triton.jit
def _forward_kernel(
    x,
    weight,
    bias,
    initial,
    run,
    y,
    tokens,
    width,
    x_strides,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_RUN: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * STEPS + tl.arange(0, STEPS)
    column = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    own = _run_of(run, row, token, tokens, HAS_RUN)
    total = _total(
        x,
        weight,
        bias,
        initial,
        run,
        row,
        token,
        own,
        column,
        tokens,
        width,
        x_strides,
        HAS_BIAS,
        HAS_INITIAL,
        HAS_RUN,
        TAPS,
        STEPS,
        WIDTH,
    )
    if ACTIVATION:
        total *= 1.0 / (1.0 + tl.exp(-total))
    there = (token < tokens)[:, None] & (column < width)[None, :]
    tl.store(y + (row * tokens + token)[:, None] * width + column[None, :], total, mask=there)


@triton.jit
def _backward_kernel(
    dy,
    x,
    weight,
    bias,
    initial,
    run,
    dx,
    dweight,
    dbias,
    dinitial,
    tokens,
    width,
    dy_strides,
    x_strides,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_RUN: tl.constexpr,
    TAPS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Tiles of inputs, those before the first token among them: what each gives to the tokens behind it. dweight
    (tiles, k, E) and dbias (tiles, E): of the tokens of each tile."""
    row = tl.program_id(2).to(tl.int64)
    tile = row * tl.num_programs(1) + tl.program_id(1)
    source = tl.program_id(1).to(tl.int64) * STEPS + tl.arange(0, STEPS) - (TAPS - 1)
    column = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    of_source = _run_of(run, row, source, tokens, HAS_RUN)
    reached = tl.zeros([STEPS, WIDTH], tl.float32)
    for ahead in tl.static_range(TAPS):
        token = source + ahead
        own = _run_of(run, row, token, tokens, HAS_RUN)
        counts = ((token >= 0) & (token < tokens))[:, None] & inside[None, :]
        at = dy + row * dy_strides[0] + token[:, None] * dy_strides[1] + column[None, :] * dy_strides[2]
        grad = tl.load(at, mask=counts, other=0.0).to(tl.float32)
        if ACTIVATION:
            total = _total(
                x,
                weight,
                bias,
                initial,
                run,
                row,
                token,
                own,
                column,
                tokens,
                width,
                x_strides,
                HAS_BIAS,
                HAS_INITIAL,
                HAS_RUN,
                TAPS,
                STEPS,
                WIDTH,
            )
            share = 1.0 / (1.0 + tl.exp(-total))
            grad *= share * (1.0 + total * (1.0 - share))
        if ahead == 0:
            if HAS_BIAS:
                tl.store(dbias + tile * width + column, tl.sum(grad, 0), mask=inside)
            for j in tl.static_range(TAPS):
                seen = _seen(
                    x,
                    initial,
                    run,
                    row,
                    token - (TAPS - 1 - j),
                    own,
                    column,
                    tokens,
                    width,
                    x_strides,
                    HAS_INITIAL,
                    HAS_RUN,
                    TAPS,
                )
                tl.store(dweight + (tile * TAPS + j) * width + column, tl.sum(grad * seen, 0), mask=inside)
        tap = tl.load(weight + column * TAPS + (TAPS - 1 - ahead), mask=inside, other=0.0).to(tl.float32)
        reached += tl.where((own == of_source)[:, None], grad * tap[None, :], 0.0)
    there = (source >= 0) & (source < tokens)
    at = dx + (row * tokens + source)[:, None] * width + column[None, :]
    tl.store(at, reached, mask=there[:, None] & inside[None, :])
    if HAS_INITIAL:
        at = dinitial + (row * (TAPS - 1) + source + (TAPS - 1))[:, None] * width + column[None, :]
        tl.store(at, reached, mask=(source < 0)[:, None] & inside[None, :])


def _forward(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    run: Tensor | None,
    activation: bool,
) -> None:
    rows, tokens, width = x.shape
    chosen = _launch("causal_conv1d.forward", x, weight)
    grid = triton.cdiv(width, chosen["WIDTH"]), triton.cdiv(tokens, chosen["STEPS"]), rows
    _forward_kernel[grid](
        x,
        *_dense(weight, bias, initial, run),
        y,
        tokens,
        width,
        x.stride(),
        ACTIVATION=activation,
        **_has(bias, initial, run),
        **chosen,
    )


def _backward(
    made: Gradients,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    run: Tensor | None,
    activation: bool,
) -> None:
    dx, dweight, dbias, dinitial = made
    (rows, tokens, width), taps = x.shape, weight.shape[2]
    chosen = _launch("causal_conv1d.backward", x, weight)
    tiles = triton.cdiv(tokens + taps - 1, chosen["STEPS"])
    of_taps = dweight.new_empty(rows * tiles, taps, width)
    of_shift = dweight.new_empty(rows * tiles, width)
    _backward_kernel[(triton.cdiv(width, chosen["WIDTH"]), tiles, rows)](
        dy,
        x,
        *_dense(weight, bias, initial, run),
        dx,
        of_taps,
        of_shift,
        dinitial,
        tokens,
        width,
        dy.stride(),
        x.stride(),
        ACTIVATION=activation,
        **_has(bias, initial, run),
        **chosen,
    )
    dweight.copy_(of_taps.sum(0).t()[:, None])
    if bias is not None:
        dbias.copy_(of_shift.sum(0))


def _launch(kernel: str, x: Tensor, weight: Tensor) -> dict[str, Any]:
    width, taps = x.shape[2], weight.shape[2]
    default = {"STEPS": 16, "WIDTH": min(64, triton.next_power_of_2(width)), "num_warps": 4}
    key: dict[str, int | str] = {"width": width, "taps": taps, "dtype": str(x.dtype)}
    chosen = launch(kernel, x.device, key, default, {"STEPS": (8, 16, 32, 64), "WIDTH": (32, 64, 128)})
    return {**chosen, "TAPS": taps}


def _dense(*given: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in given]


def _has(bias: Tensor | None, initial: Tensor | None, run: Tensor | None) -> dict[str, bool]:
    return {"HAS_BIAS": bias is not None, "HAS_INITIAL": initial is not None, "HAS_RUN": run is not None}


causal_conv1d = operation("triton", _forward, _backward)
