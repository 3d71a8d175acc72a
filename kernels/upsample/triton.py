"""Chunks over their places, on a GPU: forward each value is read and written once. Backward a program has a chunk,
whose places are neighbours: it sums their gradients, and multiplies each with what the chunk held, in one pass. Nothing
is added in an order that may change.

    dz_j = sum over places t of chunk j of scale_t dout_t;  dscale_t = sum over D of dout_t z_{chunk of t}

Shapes: R rows, C chunks, M places, D width, P parts of the width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.library import opaque
from kernels.tuned import launch

__all__ = ["upsample"]


def upsample(z: Tensor, chunk: Tensor, scale: Tensor, residual: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Arguments and result as `reference`."""
    result: Tensor = _operation(z, chunk, scale, residual, dtype)
    return result


@triton.jit
def _forward_kernel(
    z,
    chunk,
    scale,
    residual,
    out,
    places,
    width,
    tiles,
    z_strides,
    chunk_strides,
    scale_strides,
    residual_strides,
    PLACES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    place = (tl.program_id(0) % tiles).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    column = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    there = place < places
    inside = there[:, None] & (column < width)[None, :]
    number = tl.load(chunk + row * chunk_strides[0] + place * chunk_strides[1], mask=there, other=0)
    factor = tl.load(scale + row * scale_strides[0] + place * scale_strides[1], mask=there, other=0.0)
    values = tl.load(
        z + row * z_strides[0] + number[:, None] * z_strides[1] + column[None, :] * z_strides[2],
        mask=inside,
        other=0.0,
    ).to(tl.float32)
    added = tl.load(
        residual
        + row * residual_strides[0]
        + place[:, None] * residual_strides[1]
        + column[None, :] * residual_strides[2],
        mask=inside,
        other=0.0,
    ).to(tl.float32)
    tl.store(
        out + (row * places + place)[:, None] * width + column[None, :],
        factor.to(tl.float32)[:, None] * values + added,
        mask=inside,
    )


@triton.jit
def _backward_kernel(
    dout,
    z,
    scale,
    starts,
    dz,
    dscale,
    rows,
    places,
    chunks,
    width,
    dout_strides,
    z_strides,
    scale_strides,
    PLACES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """starts (R, C + 1): the first place of each chunk, or of those behind it; dscale (P, R, M): each program's
    channels."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    number = (tl.program_id(0) % chunks).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    column = part * WIDTH + tl.arange(0, WIDTH)
    in_width = column < width
    first = tl.load(starts + row * (chunks + 1) + number)
    end = tl.load(starts + row * (chunks + 1) + number + 1)
    held = tl.load(
        z + row * z_strides[0] + number * z_strides[1] + column * z_strides[2],
        mask=in_width & (first < end),
        other=0.0,
    ).to(tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for i in tl.range(0, tl.cdiv(end - first, PLACES)):
        place = first + i * PLACES + tl.arange(0, PLACES)
        there = place < end
        grads = tl.load(
            dout
            + row * dout_strides[0]
            + place[:, None] * dout_strides[1]
            + column[None, :] * dout_strides[2],
            mask=there[:, None] & in_width[None, :],
            other=0.0,
        ).to(tl.float32)
        factor = tl.load(scale + row * scale_strides[0] + place * scale_strides[1], mask=there, other=0.0)
        total += tl.sum(factor.to(tl.float32)[:, None] * grads, 0)
        tl.store(dscale + (part * rows + row) * places + place, tl.sum(grads * held[None, :], 1), mask=there)
    tl.store(dz + (row * chunks + number) * width + column, total, mask=in_width)


def _forward(z: Tensor, chunk: Tensor, scale: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    out = _like(z, chunk, scale, residual, dtype)
    if not out.numel():
        return out
    rows, places, width = out.shape
    chosen = _launch("upsample.forward", z, {"PLACES": 8, "WIDTH": 256, "num_warps": 4})
    tiles = triton.cdiv(places, chosen["PLACES"])
    _forward_kernel[(rows * tiles, triton.cdiv(width, chosen["WIDTH"]))](
        z,
        chunk,
        scale,
        residual,
        out,
        places,
        width,
        tiles,
        z.stride(),
        chunk.stride(),
        scale.stride(),
        residual.stride(),
        **chosen,
    )
    return out


def _backward(dout: Tensor, z: Tensor, chunk: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """-> dz like z, dscale (R, M) fp32."""
    dz, dscale = _gradients(dout, z, chunk, scale)
    if not dout.numel():
        return dz.zero_(), dscale.zero_()
    rows, chunks, width = z.shape
    places = dout.shape[1]
    chosen = _launch("upsample.backward", z, {"PLACES": 4, "WIDTH": 1024, "num_warps": 4})
    parts = triton.cdiv(width, chosen["WIDTH"])
    shares = dscale.new_empty(parts, rows, places)
    each = torch.arange(chunks + 1, device=z.device).expand(rows, -1).contiguous()
    _backward_kernel[(rows * chunks, parts)](
        dout,
        z,
        scale,
        torch.searchsorted(chunk.contiguous(), each),
        dz,
        shares,
        rows,
        places,
        chunks,
        width,
        dout.stride(),
        z.stride(),
        scale.stride(),
        **chosen,
    )
    return dz, shares.sum(0)


def _launch(kernel: str, z: Tensor, default: dict[str, Any]) -> dict[str, Any]:
    width = z.shape[2]
    default["WIDTH"] = min(default["WIDTH"], triton.next_power_of_2(width))
    vary = {"PLACES": (1, 2, 4, 8, 16), "WIDTH": (128, 256, 512, 1024, 2048)}
    return launch(kernel, z.device, {"width": width, "dtype": str(z.dtype)}, default, vary)


def _like(z: Tensor, chunk: Tensor, scale: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """What `_forward` returns, without values."""
    return torch.empty(residual.shape, dtype=dtype, device=z.device)


def _gradients(dout: Tensor, z: Tensor, chunk: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What `_backward` returns, without values."""
    return (
        torch.empty(z.shape, dtype=z.dtype, device=z.device),
        torch.empty(chunk.shape, dtype=torch.float32, device=z.device),
    )


def _flops(z: Any, chunk: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * chunk[0] * chunk[1] * z[2]


_operation = opaque("upsample", _forward, _like, flops=_flops)
_differentiated = opaque(
    "upsample_backward", _backward, _gradients, flops=lambda dout, z, chunk, *a, **k: 2 * _flops(z, chunk)
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, chunk, scale, residual, _ = inputs
    ctx.save_for_backward(z, chunk, scale)
    ctx.residual_dtype = residual.dtype


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    z, chunk, scale = ctx.saved_tensors
    dz, dscale = _differentiated(dout, z, chunk, scale)
    return dz, None, dscale.to(scale.dtype), dout.to(ctx.residual_dtype), None


_operation.register_autograd(_differentiate, setup_context=_save)
