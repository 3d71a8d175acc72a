"""Queries and keys normalised and rotated on a GPU: one pass over both, forward and backward.

A row is one head of one token; a program takes tiles of rows of q or of k. q and k may be views of a fused projection.
Backward, a few programs per multiprocessor keep their share of the gradients of the weights, summed up afterwards.

Shapes: B rows of a batch, T tokens, H and G heads, h head width; the first r dims turn in pairs, the others pass.
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

__all__ = ["qk_norm_rope"]

TILE_BYTES = 8 * 1024  # of what a step reads of q or k; backward reads gradients too
PROGRAMS_PER_SM = 4  # backward


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `reference`."""
    return _operation(q, k, cos, sin, q_weight, k_weight, eps, interleaved)


@triton.jit
def _columns(TURNED: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Where the dims of each pair lie in layout "half". What passes is taken for pairs too, by an angle of 0."""
    pair = tl.arange(0, PAIRS)
    if TURNED == HALF:
        return pair, pair + HALF
    turns = pair < TURNED
    return tl.where(turns, pair, pair + TURNED), tl.where(turns, pair + TURNED, pair + HALF)


@triton.jit
def _load(
    x, start, inside, TURNED: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, SPLIT: tl.constexpr
):
    """The two dims of each pair (ROWS, PAIRS) of rows that begin at `start`, in fp32."""
    if SPLIT:
        column = tl.arange(0, 2 * PAIRS)
        mask = inside[:, None] & (column < 2 * HALF)[None, :]
        both = tl.load(x + start[:, None] + column[None, :], mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(both, [start.shape[0], PAIRS, 2]))
    else:
        first, second = _columns(TURNED, HALF, PAIRS)
        mask = inside[:, None] & (tl.arange(0, PAIRS) < HALF)[None, :]
        a = tl.load(x + start[:, None] + first[None, :], mask=mask, other=0.0)
        b = tl.load(x + start[:, None] + second[None, :], mask=mask, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store(
    y, start, inside, a, b, TURNED: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, SPLIT: tl.constexpr
):
    if SPLIT:
        column = tl.arange(0, 2 * PAIRS)
        mask = inside[:, None] & (column < 2 * HALF)[None, :]
        both = tl.reshape(tl.join(a, b), [start.shape[0], 2 * PAIRS])
        tl.store(y + start[:, None] + column[None, :], both, mask=mask)
    else:
        first, second = _columns(TURNED, HALF, PAIRS)
        mask = inside[:, None] & (tl.arange(0, PAIRS) < HALF)[None, :]
        tl.store(y + start[:, None] + first[None, :], a, mask=mask)
        tl.store(y + start[:, None] + second[None, :], b, mask=mask)


@triton.jit
def _angles(
    cos, sin, token, length, inside, OF_BATCH: tl.constexpr, TURNED: tl.constexpr, PAIRS: tl.constexpr
):
    """Cosine and sine of each pair (ROWS, PAIRS)."""
    pair = tl.arange(0, PAIRS)
    mask = inside[:, None] & (pair < TURNED)[None, :]
    entry = token if OF_BATCH else token % length
    place = entry.to(tl.int64)[:, None] * TURNED + pair[None, :]
    return tl.load(cos + place, mask=mask, other=1.0), tl.load(sin + place, mask=mask, other=0.0)


@triton.jit
def _start(token, head, length, strides):
    """Of rows of a view: a fused projection has all of itself between its tokens."""
    batch, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
    return batch * strides[0] + place * strides[1] + head.to(tl.int64) * strides[2]


@triton.jit
def _turn(
    tile,
    x,
    weight,
    cos,
    sin,
    y,
    tokens,
    length,
    strides,
    eps,
    HEADS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OF_BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tile * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    inside = token < tokens
    start = _start(token, head, length, strides)
    a, b = _load(x, start, inside, TURNED, HALF, PAIRS, SPLIT)
    if HAS_WEIGHT:
        scale = 1 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
        zero = tl.zeros([1], tl.int32)
        gain_a, gain_b = _load(weight, zero, zero == 0, TURNED, HALF, PAIRS, SPLIT)
        a, b = a * scale[:, None] * gain_a, b * scale[:, None] * gain_b
    c, s = _angles(cos, sin, token, length, inside, OF_BATCH, TURNED, PAIRS)
    start = row.to(tl.int64) * (2 * HALF)
    _store(y, start, inside, a * c - b * s, b * c + a * s, TURNED, HALF, PAIRS, SPLIT)


@triton.jit
def _turn_back(
    program,
    programs,
    tiles,
    dy,
    x,
    weight,
    cos,
    sin,
    dx,
    dweight,
    tokens,
    length,
    dy_strides,
    strides,
    eps,
    HEADS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OF_BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    zero = tl.zeros([1], tl.int32)
    if HAS_WEIGHT:
        gain_a, gain_b = _load(weight, zero, zero == 0, TURNED, HALF, PAIRS, SPLIT)
        sum_a, sum_b = tl.zeros([1, PAIRS], tl.float32), tl.zeros([1, PAIRS], tl.float32)
    for tile in tl.range(program, tiles, programs, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        token, head = row // HEADS, row % HEADS
        inside = token < tokens
        start = _start(token, head, length, dy_strides)
        turned_a, turned_b = _load(dy, start, inside, TURNED, HALF, PAIRS, SPLIT)
        c, s = _angles(cos, sin, token, length, inside, OF_BATCH, TURNED, PAIRS)
        grad_a, grad_b = turned_a * c + turned_b * s, turned_b * c - turned_a * s
        if HAS_WEIGHT:
            start = _start(token, head, length, strides)
            a, b = _load(x, start, inside, TURNED, HALF, PAIRS, SPLIT)
            scale = 1 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
            a, b = a * scale, b * scale
            sum_a += tl.sum(grad_a * a, 0, keep_dims=True)
            sum_b += tl.sum(grad_b * b, 0, keep_dims=True)
            grad_a, grad_b = grad_a * gain_a, grad_b * gain_b
            along = ((tl.sum(grad_a * a, 1) + tl.sum(grad_b * b, 1)) / (2 * HALF))[:, None]
            grad_a, grad_b = (grad_a - a * along) * scale, (grad_b - b * along) * scale
        start = row.to(tl.int64) * (2 * HALF)
        _store(dx, start, inside, grad_a, grad_b, TURNED, HALF, PAIRS, SPLIT)
    if HAS_WEIGHT:
        start = zero.to(tl.int64) + program * (2 * HALF)
        _store(dweight, start, zero == 0, sum_a, sum_b, TURNED, HALF, PAIRS, SPLIT)


@triton.jit
def _forward_kernel(
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    q_out,
    k_out,
    q_tiles,
    tokens,
    length,
    q_strides,
    k_strides,
    eps,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OF_BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    program = tl.program_id(0)
    if program < q_tiles:
        _turn(
            program,
            q,
            q_weight,
            cos,
            sin,
            q_out,
            tokens,
            length,
            q_strides,
            eps,
            Q_HEADS,
            HAS_WEIGHT,
            OF_BATCH,
            ROWS,
            TURNED,
            HALF,
            PAIRS,
            SPLIT,
        )
    else:
        _turn(
            program - q_tiles,
            k,
            k_weight,
            cos,
            sin,
            k_out,
            tokens,
            length,
            k_strides,
            eps,
            K_HEADS,
            HAS_WEIGHT,
            OF_BATCH,
            ROWS,
            TURNED,
            HALF,
            PAIRS,
            SPLIT,
        )


@triton.jit
def _backward_kernel(
    dq_out,
    dk_out,
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    dq,
    dk,
    dq_weight,
    dk_weight,
    q_programs,
    k_programs,
    q_tiles,
    k_tiles,
    tokens,
    length,
    dq_strides,
    dk_strides,
    q_strides,
    k_strides,
    eps,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    OF_BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    TURNED: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    if program < q_programs:
        _turn_back(
            program,
            q_programs,
            q_tiles,
            dq_out,
            q,
            q_weight,
            cos,
            sin,
            dq,
            dq_weight,
            tokens,
            length,
            dq_strides,
            q_strides,
            eps,
            Q_HEADS,
            HAS_WEIGHT,
            OF_BATCH,
            ROWS,
            TURNED,
            HALF,
            PAIRS,
            SPLIT,
            STAGES,
        )
    else:
        _turn_back(
            program - q_programs,
            k_programs,
            k_tiles,
            dk_out,
            k,
            k_weight,
            cos,
            sin,
            dk,
            dk_weight,
            tokens,
            length,
            dk_strides,
            k_strides,
            eps,
            K_HEADS,
            HAS_WEIGHT,
            OF_BATCH,
            ROWS,
            TURNED,
            HALF,
            PAIRS,
            SPLIT,
            STAGES,
        )


def _forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """-> q (B, T, H, h) and k (B, T, G, h), contiguous."""
    q_out, k_out = _outputs(q, k, cos, sin, q_weight, k_weight, eps, interleaved)
    if not q_out.numel():
        return q_out, k_out
    q, k = _dense_heads(q), _dense_heads(k)
    chosen = _launch("qk_norm_rope.forward", q, TILE_BYTES)
    tokens = q.shape[0] * q.shape[1]
    q_tiles, k_tiles = (triton.cdiv(tokens * x.shape[2], chosen["ROWS"]) for x in (q, k))
    _forward_kernel[(q_tiles + k_tiles,)](
        q,
        k,
        *_dense(q_weight, k_weight, cos, sin),
        q_out,
        k_out,
        q_tiles,
        tokens,
        q.shape[1],
        q.stride()[:3],
        k.stride()[:3],
        eps,
        **_constants(q, k, cos, q_weight, interleaved),
        **chosen,
    )
    return q_out, k_out


def _backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k only with weights -> dq, dk, and the gradients of the weights (h,) fp32 (empty without)."""
    dq, dk, dq_weight, dk_weight = _gradients(
        dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, eps, interleaved
    )
    if not dq.numel():
        return dq, dk, dq_weight.zero_(), dk_weight.zero_()
    dq_out, dk_out = _dense_heads(dq_out), _dense_heads(dk_out)
    q, k = (dq_out, dk_out) if q is None or k is None else (_dense_heads(q), _dense_heads(k))
    chosen = _launch("qk_norm_rope.backward", dq, TILE_BYTES // 2)
    tokens = dq.shape[0] * dq.shape[1]
    q_tiles, k_tiles = (triton.cdiv(tokens * x.shape[2], chosen["ROWS"]) for x in (dq, dk))
    gpu = gpu_of(dq.device)
    per_program = triton.cdiv(q_tiles + k_tiles, PROGRAMS_PER_SM * (gpu.sms if gpu else 1))
    q_programs, k_programs = triton.cdiv(q_tiles, per_program), triton.cdiv(k_tiles, per_program)
    shares = [
        torch.empty(programs, len(dweight), dtype=torch.float32, device=dq.device)
        for programs, dweight in ((q_programs, dq_weight), (k_programs, dk_weight))
    ]
    _backward_kernel[(q_programs + k_programs,)](
        dq_out,
        dk_out,
        q,
        k,
        *_dense(q_weight, k_weight, cos, sin),
        dq,
        dk,
        *shares,
        q_programs,
        k_programs,
        q_tiles,
        k_tiles,
        tokens,
        dq.shape[1],
        dq_out.stride()[:3],
        dk_out.stride()[:3],
        q.stride()[:3],
        k.stride()[:3],
        eps,
        **_constants(dq, dk, cos, q_weight, interleaved),
        STAGES=chosen.pop("num_stages"),
        **chosen,
    )
    return dq, dk, shares[0].sum(0), shares[1].sum(0)


def _constants(q: Tensor, k: Tensor, cos: Tensor, weight: Tensor | None, interleaved: bool) -> dict[str, Any]:
    half = q.shape[3] // 2
    return {
        "Q_HEADS": q.shape[2],
        "K_HEADS": k.shape[2],
        "HAS_WEIGHT": weight is not None,
        "OF_BATCH": cos.ndim == 4,
        "TURNED": cos.shape[-1],
        "HALF": half,
        "PAIRS": triton.next_power_of_2(half),
        "SPLIT": interleaved,
    }


def _dense_heads(x: Tensor) -> Tensor:
    """(B, T, heads, h) with neighbouring dims; a copy only where strides ask for one."""
    return x if x.stride(3) == 1 else x.contiguous()


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _launch(kernel: str, x: Tensor, tile_bytes: int) -> dict[str, Any]:
    width = triton.next_power_of_2(x.shape[3])
    rows = max(1, min(128, tile_bytes // (width * x.element_size())))
    default = {"ROWS": rows, "num_warps": 4, "num_stages": 2}
    return launch(kernel, x.device, {"width": width, "dtype": str(x.dtype)}, default)


def _outputs(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """What `_forward` returns, without values."""
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _gradients(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_backward` returns, without values."""

    def dweight() -> Tensor:
        return torch.empty(
            0 if q_weight is None else dq_out.shape[3], dtype=torch.float32, device=dq_out.device
        )

    return dq_out.new_empty(dq_out.shape), dk_out.new_empty(dk_out.shape), dweight(), dweight()


_operation = opaque(
    "qk_norm_rope",
    _forward,
    _outputs,
    flops=lambda q, k, cos, sin, q_weight, *args, **kwargs: (
        (3 if q_weight is None else 7) * (q.numel() + k.numel())
    ),
)
_differentiated = opaque("qk_norm_rope_backward", _backward, _gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, cos, sin, q_weight, k_weight, ctx.eps, ctx.interleaved = inputs
    normed = q_weight is not None
    ctx.save_for_backward(q if normed else None, k if normed else None, cos, sin, q_weight, k_weight)


def _differentiate(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    q, k, cos, sin, q_weight, k_weight = ctx.saved_tensors
    dq, dk, dq_weight, dk_weight = _differentiated(
        dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, ctx.eps, ctx.interleaved
    )
    dweights = (
        (None, None) if q_weight is None else (dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype))
    )
    return dq, dk, None, None, *dweights, None, None


_operation.register_autograd(_differentiate, setup_context=_save)
