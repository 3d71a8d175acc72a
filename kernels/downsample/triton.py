"""What opens chunks on a GPU: forward each of them is read and written once. Backward a program has places, and reads
the gradient of a chunk where one opens it: every place is written once, and nothing is added up.

Shapes: R rows, M places, C chunks, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.library import opaque
from kernels.tuned import launch

__all__ = ["downsample"]


def downsample(x: Tensor, p: Tensor, opens: Tensor, source: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results as `reference`."""
    z, weight = _operation(x, p, opens, source, chunk)
    return z, weight


@triton.jit
def _forward_kernel(
    x,
    p,
    opens,
    source,
    chunk,
    z,
    weight,
    chunks,
    width,
    tiles,
    x_strides,
    p_strides,
    opens_strides,
    source_strides,
    chunk_strides,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    number = (tl.program_id(0) % tiles).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    column = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    there = number < chunks
    inside = there[:, None] & (column < width)[None, :]
    place = tl.load(source + row * source_strides[0] + number * source_strides[1], mask=there, other=0)
    # Behind a row's chunks stands a place that opens another one, or none.
    opened = tl.load(opens + row * opens_strides[0] + place * opens_strides[1], mask=there, other=0) != 0
    own = tl.load(chunk + row * chunk_strides[0] + place * chunk_strides[1], mask=there, other=-1)
    real = there & opened & (own == number)
    values = tl.load(
        x + row * x_strides[0] + place[:, None] * x_strides[1] + column[None, :] * x_strides[2],
        mask=real[:, None] & inside,
        other=0.0,
    )
    tl.store(z + (row * chunks + number)[:, None] * width + column[None, :], values, mask=inside)
    of_p = tl.load(p + row * p_strides[0] + place * p_strides[1], mask=real, other=0.0)
    tl.store(weight + row * chunks + number, of_p, mask=there & (tl.program_id(1) == 0))


@triton.jit
def _backward_kernel(
    dz,
    dweight,
    opens,
    chunk,
    dx,
    dp,
    places,
    chunks,
    width,
    tiles,
    dz_strides,
    dweight_strides,
    opens_strides,
    chunk_strides,
    PLACES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    place = (tl.program_id(0) % tiles).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    column = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    there = place < places
    inside = there[:, None] & (column < width)[None, :]
    opened = tl.load(opens + row * opens_strides[0] + place * opens_strides[1], mask=there, other=0) != 0
    number = tl.load(chunk + row * chunk_strides[0] + place * chunk_strides[1], mask=there, other=0)
    real = opened & (number < chunks)
    grads = tl.load(
        dz + row * dz_strides[0] + number[:, None] * dz_strides[1] + column[None, :] * dz_strides[2],
        mask=real[:, None] & inside,
        other=0.0,
    )
    tl.store(dx + (row * places + place)[:, None] * width + column[None, :], grads, mask=inside)
    of_weight = tl.load(
        dweight + row * dweight_strides[0] + number * dweight_strides[1], mask=real & there, other=0.0
    )
    tl.store(dp + row * places + place, of_weight, mask=there & (tl.program_id(1) == 0))


def _forward(x: Tensor, p: Tensor, opens: Tensor, source: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
    z, weight = _like(x, p, opens, source, chunk)
    if not weight.numel():
        return z, weight
    rows, chunks, width = z.shape
    chosen = _launch("downsample.forward", x, "CHUNKS")
    tiles = triton.cdiv(chunks, chosen["CHUNKS"])
    _forward_kernel[(rows * tiles, max(1, triton.cdiv(width, chosen["WIDTH"])))](
        x,
        p,
        opens,
        source,
        chunk,
        z,
        weight,
        chunks,
        width,
        tiles,
        x.stride(),
        p.stride(),
        opens.stride(),
        source.stride(),
        chunk.stride(),
        **chosen,
    )
    return z, weight


def _backward(dz: Tensor, dweight: Tensor, opens: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """-> dx (R, M, D) like dz, dp (R, M) like dweight."""
    dx, dp = _gradients(dz, dweight, opens, chunk)
    if not dp.numel():
        return dx, dp
    rows, places, width = dx.shape
    chosen = _launch("downsample.backward", dz, "PLACES")
    tiles = triton.cdiv(places, chosen["PLACES"])
    _backward_kernel[(rows * tiles, max(1, triton.cdiv(width, chosen["WIDTH"])))](
        dz,
        dweight,
        opens,
        chunk,
        dx,
        dp,
        places,
        dz.shape[1],
        width,
        tiles,
        dz.stride(),
        dweight.stride(),
        opens.stride(),
        chunk.stride(),
        **chosen,
    )
    return dx, dp


def _launch(kernel: str, x: Tensor, of_rows: str) -> dict[str, Any]:
    width = x.shape[2]
    default = {of_rows: 4, "WIDTH": min(512, triton.next_power_of_2(max(1, width))), "num_warps": 4}
    vary = {of_rows: (1, 2, 4, 8, 16), "WIDTH": (128, 256, 512, 1024)}
    return launch(kernel, x.device, {"width": width, "dtype": str(x.dtype)}, default, vary)


def _like(x: Tensor, p: Tensor, opens: Tensor, source: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """What `_forward` returns, without values."""
    return (
        torch.empty(*source.shape, x.shape[2], dtype=x.dtype, device=x.device),
        torch.empty(source.shape, dtype=p.dtype, device=x.device),
    )


def _gradients(dz: Tensor, dweight: Tensor, opens: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """What `_backward` returns, without values."""
    return (
        torch.empty(*opens.shape, dz.shape[2], dtype=dz.dtype, device=dz.device),
        torch.empty(opens.shape, dtype=dweight.dtype, device=dz.device),
    )


_operation = opaque("downsample", _forward, _like)
_differentiated = opaque("downsample_backward", _backward, _gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, opens, _, chunk = inputs
    ctx.save_for_backward(opens, chunk)


def _differentiate(ctx: Any, dz: Tensor, dweight: Tensor) -> tuple[Tensor | None, ...]:
    dx, dp = _differentiated(dz, dweight, *ctx.saved_tensors)
    return dx, dp, None, None, None


_operation.register_autograd(_differentiate, setup_context=_save)
