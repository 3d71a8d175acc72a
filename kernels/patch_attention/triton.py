"""Attention within patches on a GPU: a program has a tile of whole patches for one head, and multiplies all of its
queries with all of its keys, most of which are masked: what counts is that each is read once, and that no scores are
written. The end of the patch before the tile is read besides. Backward computes the probabilities anew; a program
writes the gradients of its tile, for which it reads the end of the patch before and the queries of the one behind. No
two programs write to one address, and nothing is added by atomics.

    P = exp2(s - lse);  dV = P^T dO;  dS = P (dO V^T - sum of dO O);  dQ = scale dS K;  dK = scale dS^T Q

Shapes: B rows, K patches of P places, L = K P, H heads, h head width, r places of the patch before.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import device as devices
from kernels.choose import Kernels
from kernels.library import opaque
from kernels.patch_attention.plan import Backend, Options, Patches
from kernels.tuned import launch

__all__ = ["BACKEND"]

SMALLEST = 16  # what a tensor core multiplies at once
LOG2_E = 1.4426950408889634


def build(patches: Patches, options: Options, heads: int, width: int, kernels: Kernels) -> Tensor:
    return patches.follows


def attend(q: Tensor, k: Tensor, v: Tensor, patches: Patches, follows: Tensor, options: Options) -> Tensor:
    o: Tensor
    k, v = k.to(q.dtype), v.to(q.dtype)
    o, _ = _operation(q, k, v, follows, patches.known, patches.size, patches.reach)
    return o


BACKEND = Backend(build, attend)


@triton.jit
def _tile(t, strides, batch, place, head, column, there, width):
    """t (B, L, H, h) at some places of a head, (places, columns), 0 where not there."""
    at = t + batch * strides[0] + head * strides[2] + place[:, None] * strides[1]
    return tl.load(
        at + column[None, :] * strides[3], mask=there[:, None] & (column < width)[None, :], other=0.0
    )


@triton.jit
def _holds(known, strides, batch, place, there, HAS_KNOWN: tl.constexpr):
    """Which places hold something."""
    if HAS_KNOWN:
        return tl.load(known + batch * strides[0] + place * strides[1], mask=there, other=0) != 0
    else:
        return there


@triton.jit
def _may(step, follow, holds, PATCH: tl.constexpr, REACH: tl.constexpr):
    """(queries, keys) of a tile: whether one sees the other."""
    query, key = step[:, None], step[None, :]
    own = (query // PATCH == key // PATCH) & (key <= query) & (holds[None, :] | (key == query))
    before = (query // PATCH == key // PATCH + 1) & (key % PATCH >= PATCH - REACH)
    return own | (before & follow[:, None] & holds[None, :])


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    follows,
    known,
    o,
    lse,
    places,
    heads,
    width,
    tiles,
    scale,
    q_strides,
    k_strides,
    v_strides,
    follows_strides,
    known_strides,
    PATCH: tl.constexpr,
    REACH: tl.constexpr,
    HAS_KNOWN: tl.constexpr,
    ROWS: tl.constexpr,
    BEFORE: tl.constexpr,
    WIDTH: tl.constexpr,
    RAISE: tl.constexpr,
):
    """o (B, L, H, h); lse (B, L, H), to base 2."""
    TAKEN: tl.constexpr = ROWS // PATCH * PATCH
    head = (tl.program_id(0) % heads).to(tl.int64)
    first = ((tl.program_id(0) // heads) % tiles).to(tl.int64) * TAKEN
    batch = (tl.program_id(0) // heads // tiles).to(tl.int64)
    step, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    place = first + step
    there = (step < TAKEN) & (place < places)
    asked = _tile(q, q_strides, batch, place, head, column, there, width)
    of_keys = _tile(k, k_strides, batch, place, head, column, there, width)
    values = _tile(v, v_strides, batch, place, head, column, there, width)
    if RAISE:
        asked, of_keys, values = asked.to(tl.float32), of_keys.to(tl.float32), values.to(tl.float32)
    at = follows + batch * follows_strides[0] + (place // PATCH) * follows_strides[1]
    follow = tl.load(at, mask=there, other=0) != 0
    holds = _holds(known, known_strides, batch, place, there, HAS_KNOWN)
    scores = scale * tl.dot(asked, tl.trans(of_keys), input_precision="ieee")
    scores = tl.where(_may(step, follow, holds, PATCH, REACH), scores, float("-inf"))
    largest = tl.max(scores, 1)
    if REACH > 0:
        back = tl.arange(0, BEFORE)
        earlier = first - REACH + back
        real = (back < REACH) & (earlier >= 0)
        keys_before = _tile(k, k_strides, batch, earlier, head, column, real, width)
        values_before = _tile(v, v_strides, batch, earlier, head, column, real, width)
        if RAISE:
            keys_before, values_before = keys_before.to(tl.float32), values_before.to(tl.float32)
        real = _holds(known, known_strides, batch, earlier, real, HAS_KNOWN)
        may = ((step < PATCH) & follow)[:, None] & real[None, :]
        more = scale * tl.dot(asked, tl.trans(keys_before), input_precision="ieee")
        more = tl.where(may, more, float("-inf"))
        largest = tl.maximum(largest, tl.max(more, 1))
    shares = tl.exp2(scores - largest[:, None])
    total = tl.sum(shares, 1)
    found = tl.dot(shares.to(values.dtype), values, input_precision="ieee")
    if REACH > 0:
        more = tl.exp2(more - largest[:, None])
        total += tl.sum(more, 1)
        found = tl.dot(more.to(values_before.dtype), values_before, found, input_precision="ieee")
    found = found / total[:, None]
    at = (batch * places + place) * heads + head
    tl.store(lse + at, largest + tl.log2(total), mask=there)
    tl.store(
        o + at[:, None] * width + column[None, :],
        found.to(o.dtype.element_ty),
        mask=there[:, None] & (column < width)[None, :],
    )


@triton.jit
def _backward_kernel(
    q,
    k,
    v,
    follows,
    known,
    o,
    lse,
    do,
    dq,
    dk,
    dv,
    places,
    heads,
    width,
    tiles,
    scale,
    factor,
    q_strides,
    k_strides,
    v_strides,
    follows_strides,
    known_strides,
    o_strides,
    do_strides,
    PATCH: tl.constexpr,
    REACH: tl.constexpr,
    HAS_KNOWN: tl.constexpr,
    ROWS: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    WIDTH: tl.constexpr,
    RAISE: tl.constexpr,
):
    """dq, dk, dv (B, L, H, h)."""
    TAKEN: tl.constexpr = ROWS // PATCH * PATCH
    head = (tl.program_id(0) % heads).to(tl.int64)
    first = ((tl.program_id(0) // heads) % tiles).to(tl.int64) * TAKEN
    batch = (tl.program_id(0) // heads // tiles).to(tl.int64)
    step, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    place = first + step
    there = (step < TAKEN) & (place < places)
    asked = _tile(q, q_strides, batch, place, head, column, there, width)
    of_keys = _tile(k, k_strides, batch, place, head, column, there, width)
    values = _tile(v, v_strides, batch, place, head, column, there, width)
    grad = _tile(do, do_strides, batch, place, head, column, there, width)
    out = _tile(o, o_strides, batch, place, head, column, there, width)
    reached = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    at = (batch * places + place) * heads + head
    weight = tl.load(lse + at, mask=there, other=0.0)
    if RAISE:
        asked, of_keys, values = asked.to(tl.float32), of_keys.to(tl.float32), values.to(tl.float32)
        grad = grad.to(tl.float32)
    of_patch = follows + batch * follows_strides[0] + (place // PATCH) * follows_strides[1]
    follow = tl.load(of_patch, mask=there, other=0) != 0
    holds = _holds(known, known_strides, batch, place, there, HAS_KNOWN)
    may = _may(step, follow, holds, PATCH, REACH) & there[:, None]
    scores = scale * tl.dot(asked, tl.trans(of_keys), input_precision="ieee")
    shares = tl.exp2(tl.where(may, scores - weight[:, None], float("-inf")))
    of_values = tl.dot(tl.trans(shares.to(grad.dtype)), grad, input_precision="ieee")
    dshares = tl.dot(grad, tl.trans(values), input_precision="ieee")
    dscores = (shares * (dshares - reached[:, None])).to(asked.dtype)
    of_known = tl.dot(tl.trans(dscores), asked, input_precision="ieee")
    of_asked = tl.dot(dscores, of_keys, input_precision="ieee")
    if REACH > 0:
        back = tl.arange(0, BEFORE)
        earlier = first - REACH + back
        real = (back < REACH) & (earlier >= 0)
        keys_before = _tile(k, k_strides, batch, earlier, head, column, real, width)
        values_before = _tile(v, v_strides, batch, earlier, head, column, real, width)
        if RAISE:
            keys_before, values_before = keys_before.to(tl.float32), values_before.to(tl.float32)
        real = _holds(known, known_strides, batch, earlier, real, HAS_KNOWN)
        may = ((step < PATCH) & follow)[:, None] & real[None, :]
        more = scale * tl.dot(asked, tl.trans(keys_before), input_precision="ieee")
        more = tl.exp2(tl.where(may, more - weight[:, None], float("-inf")))
        dmore = tl.dot(grad, tl.trans(values_before), input_precision="ieee")
        dmore = (more * (dmore - reached[:, None])).to(keys_before.dtype)
        of_asked = tl.dot(dmore, keys_before, of_asked, input_precision="ieee")
    inside = there[:, None] & (column < width)[None, :]
    to = at[:, None] * width + column[None, :]
    tl.store(dq + to, (factor * of_asked).to(dq.dtype.element_ty), mask=inside)
    if REACH > 0:  # the patch behind the tile sees the end of its last one
        following = tl.arange(0, AFTER)
        later = first + TAKEN + following
        real = (following < PATCH) & (later < places)
        asked = _tile(q, q_strides, batch, later, head, column, real, width)
        grad = _tile(do, do_strides, batch, later, head, column, real, width)
        out = _tile(o, o_strides, batch, later, head, column, real, width)
        reached = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        weight = tl.load(lse + (batch * places + later) * heads + head, mask=real, other=0.0)
        if RAISE:
            asked, grad = asked.to(tl.float32), grad.to(tl.float32)
        of_patch = follows + batch * follows_strides[0] + (later // PATCH) * follows_strides[1]
        real = tl.load(of_patch, mask=real, other=0) != 0
        may = real[:, None] & (holds & (step >= TAKEN - REACH) & (step < TAKEN))[None, :]
        more = scale * tl.dot(asked, tl.trans(of_keys), input_precision="ieee")
        more = tl.exp2(tl.where(may, more - weight[:, None], float("-inf")))
        of_values = tl.dot(tl.trans(more.to(grad.dtype)), grad, of_values, input_precision="ieee")
        dmore = tl.dot(grad, tl.trans(values), input_precision="ieee")
        dmore = (more * (dmore - reached[:, None])).to(asked.dtype)
        of_known = tl.dot(tl.trans(dmore), asked, of_known, input_precision="ieee")
    tl.store(dk + to, (factor * of_known).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + to, of_values.to(dv.dtype.element_ty), mask=inside)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, follows: Tensor, known: Tensor | None, patch: int, reach: int
) -> tuple[Tensor, Tensor]:
    o, lse = _like(q, k, v, follows, known, patch, reach)
    if o.numel():
        chosen, tiles = _launch("patch_attention.forward", q, patch, reach)
        _forward_kernel[(len(q) * tiles * q.shape[2],)](
            q,
            k,
            v,
            follows,
            known,
            o,
            lse,
            *q.shape[1:],
            tiles,
            q.shape[3] ** -0.5 * LOG2_E,
            q.stride(),
            k.stride(),
            v.stride(),
            follows.stride(),
            (0, 0) if known is None else known.stride(),
            PATCH=patch,
            REACH=reach,
            HAS_KNOWN=known is not None,
            RAISE=devices.interpreting(),  # it multiplies the bits of bf16 as integers
            **chosen,
        )
    return o, lse


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    follows: Tensor,
    known: Tensor | None,
    o: Tensor,
    lse: Tensor,
    patch: int,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _gradients(do, q, k, v)
    if dq.numel():
        chosen, tiles = _launch("patch_attention.backward", q, patch, reach)
        scale = q.shape[3] ** -0.5
        _backward_kernel[(len(q) * tiles * q.shape[2],)](
            q,
            k,
            v,
            follows,
            known,
            o,
            lse,
            do.to(q.dtype),
            dq,
            dk,
            dv,
            *q.shape[1:],
            tiles,
            scale * LOG2_E,
            scale,
            q.stride(),
            k.stride(),
            v.stride(),
            follows.stride(),
            (0, 0) if known is None else known.stride(),
            o.stride(),
            do.to(q.dtype).stride(),
            PATCH=patch,
            REACH=reach,
            HAS_KNOWN=known is not None,
            AFTER=max(SMALLEST, triton.next_power_of_2(patch)),
            RAISE=devices.interpreting(),
            **chosen,
        )
    return dq, dk, dv


def _launch(kernel: str, q: Tensor, patch: int, reach: int) -> tuple[dict[str, Any], int]:
    """How a kernel is launched, and tiles of a row. Backward has three results, and tiles of fewer rows where registers
    must hold them: so that nothing spills in bf16, compiled, not timed."""
    width = q.shape[3]
    columns = max(SMALLEST, triton.next_power_of_2(width))
    gpu = devices.gpu_of(q.device)
    capability = gpu.capability if gpu else (9, 0)
    many = capability < (9, 0) or (columns > 64 and capability < (10, 0))
    rows = 32 if kernel == "patch_attention.backward" and many else 64
    if q.element_size() > 2:  # no tensor core multiplies these: masked scores cost as much as others
        rows = SMALLEST
    default = {"ROWS": rows, "num_warps": 8 if columns > 64 else 4}
    key: dict[str, int | str] = {"width": width, "patch": patch, "reach": reach, "dtype": str(q.dtype)}
    chosen = launch(kernel, q.device, key, default, {"ROWS": (16, 32, 64, 128)})
    rows = max(chosen["ROWS"], triton.next_power_of_2(patch))
    before = max(SMALLEST, triton.next_power_of_2(max(1, reach)))
    sizes = {"ROWS": rows, "BEFORE": before, "WIDTH": columns}
    return {**chosen, **sizes}, triton.cdiv(q.shape[1], rows // patch * patch)


def _like(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """What `_forward` returns, without values."""
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(q.shape[:3], dtype=torch.float32, device=q.device),
    )


def _gradients(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `_backward` returns, without values."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    return dq, dk, dv


def _products(q: Any, patch: int, reach: int) -> int:
    """FLOPs of one product of queries and all keys that any of their patch sees."""
    return 2 * q[0] * q[1] * q[2] * q[3] * (patch + reach)


def _flops(q: Any, k: Any, v: Any, follows: Any, known: Any, patch: int, reach: int, **more: Any) -> int:
    return 2 * _products(q, patch, reach)


def _backward_flops(do: Any, q: Any, *args: Any, **more: Any) -> int:
    return 5 * _products(q, *args[-2:])


_operation = opaque("patch_attention", _forward, _like, flops=_flops)
_differentiated = opaque("patch_attention_backward", _backward, _gradients, flops=_backward_flops)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.patch, ctx.reach = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, do: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    found = _differentiated(do, *ctx.saved_tensors, ctx.patch, ctx.reach)
    return *found, None, None, None, None


_operation.register_autograd(_differentiate, setup_context=_save)
