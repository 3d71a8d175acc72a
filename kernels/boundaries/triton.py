"""Boundaries on a GPU: forward queries and keys are read once, for the three sums of products of each pair of
neighbours; lengths and cosines stay, so that backward too reads them once, and writes both gradients. No sum is shared
by programs.

    dcos_t = -(dp_t + s_t dc_t) / 2, s_t = 1 where t opens a chunk and -1 elsewhere; 0 where a document begins
    dq_{t-1} = dcos_t (k^_t - cos_t q^_{t-1}) / |q_{t-1}|;  dk_t = dcos_t (q^_{t-1} - cos_t k^_t) / |k_t|

Shapes: R rows, M places, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.library import opaque
from kernels.tuned import launch

__all__ = ["boundaries"]


def boundaries(
    q: Tensor, k: Tensor, begins: Tensor, valid: Tensor | None, last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as `reference`."""
    p, opens, c, _ = _operation(q, k, begins, valid, last)
    return p, opens, c


@triton.jit
def _forward_kernel(
    q,
    k,
    begins,
    valid,
    last,
    p,
    opens,
    c,
    kept,
    places,
    width,
    tiles,
    every,
    q_strides,
    k_strides,
    begins_strides,
    valid_strides,
    last_strides,
    HAS_VALID: tl.constexpr,
    HAS_LAST: tl.constexpr,
    PLACES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """kept (3, R, M): lengths of the query before and of the key, cosines (2 where a document begins); every = R M."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    place = (tl.program_id(0) % tiles).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    there = place < places
    behind = there & (place > 0)
    of_queries = tl.zeros([PLACES], tl.float32)
    of_keys = tl.zeros([PLACES], tl.float32)
    of_both = tl.zeros([PLACES], tl.float32)
    for i in tl.range(0, tl.cdiv(width, WIDTH)):
        column = i * WIDTH + tl.arange(0, WIDTH).to(tl.int64)
        inside = (column < width)[None, :]
        before = tl.load(
            q + row * q_strides[0] + (place - 1)[:, None] * q_strides[1] + column[None, :] * q_strides[2],
            mask=behind[:, None] & inside,
            other=0.0,
        ).to(tl.float32)
        if HAS_LAST:
            before += tl.load(
                last + row * last_strides[0] + (place * 0)[:, None] + column[None, :] * last_strides[1],
                mask=(there & (place == 0))[:, None] & inside,
                other=0.0,
            ).to(tl.float32)
        own = tl.load(
            k + row * k_strides[0] + place[:, None] * k_strides[1] + column[None, :] * k_strides[2],
            mask=there[:, None] & inside,
            other=0.0,
        ).to(tl.float32)
        of_queries += tl.sum(before * before, 1)
        of_keys += tl.sum(own * own, 1)
        of_both += tl.sum(before * own, 1)
    begin = tl.load(begins + row * begins_strides[0] + place * begins_strides[1], mask=there, other=0) != 0
    if not HAS_LAST:
        begin = begin | (place == 0)
    query_length = tl.maximum(tl.sqrt(of_queries), 1e-12)
    key_length = tl.maximum(tl.sqrt(of_keys), 1e-12)
    cosine = of_both / query_length / key_length
    unlike = tl.minimum(tl.maximum((1 - cosine) / 2, 0.0), 1.0)
    unlike = tl.where(begin, 1.0, unlike)
    open = unlike > 0.5
    if HAS_VALID:
        at = valid + row * valid_strides[0] + place * valid_strides[1]
        open = open & (tl.load(at, mask=there, other=0) != 0)
    at = row * places + place
    tl.store(p + at, unlike, mask=there)
    tl.store(opens + at, open, mask=there)
    tl.store(c + at, tl.where(open, unlike, 1 - unlike), mask=there)
    tl.store(kept + at, query_length, mask=there)
    tl.store(kept + every + at, key_length, mask=there)
    tl.store(kept + 2 * every + at, tl.where(begin, 2.0, cosine), mask=there)


@triton.jit
def _backward_kernel(
    dp,
    dc,
    q,
    k,
    last,
    opens,
    kept,
    dq,
    dk,
    places,
    width,
    tiles,
    every,
    dp_strides,
    dc_strides,
    q_strides,
    k_strides,
    last_strides,
    HAS_LAST: tl.constexpr,
    PLACES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of M + 1 places, the last of which stands for what would follow the last query: its gradient is 0."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    place = (tl.program_id(0) % tiles).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    there = place < places
    behind = (place > 0) & (place <= places)
    at = row * places + place
    query_length = tl.load(kept + at, mask=there, other=1.0)
    key_length = tl.load(kept + every + at, mask=there, other=1.0)
    cosine = tl.load(kept + 2 * every + at, mask=there, other=2.0)
    open = tl.load(opens + at, mask=there, other=0) != 0
    of_p = tl.load(dp + row * dp_strides[0] + place * dp_strides[1], mask=there, other=0.0).to(tl.float32)
    of_c = tl.load(dc + row * dc_strides[0] + place * dc_strides[1], mask=there, other=0.0).to(tl.float32)
    grad = -0.5 * (of_p + tl.where(open, of_c, -of_c))
    grad = tl.where(tl.abs(cosine) <= 1.0, grad, 0.0)
    # What is shorter than the least length was divided by that, and has no direction to lose.
    query_turned = tl.where(query_length > 1e-12, cosine, 0.0)
    key_turned = tl.where(key_length > 1e-12, cosine, 0.0)
    for i in tl.range(0, tl.cdiv(width, WIDTH)):
        column = i * WIDTH + tl.arange(0, WIDTH).to(tl.int64)
        inside = (column < width)[None, :]
        before = tl.load(
            q + row * q_strides[0] + (place - 1)[:, None] * q_strides[1] + column[None, :] * q_strides[2],
            mask=(behind & there)[:, None] & inside,
            other=0.0,
        ).to(tl.float32)
        if HAS_LAST:
            before += tl.load(
                last + row * last_strides[0] + (place * 0)[:, None] + column[None, :] * last_strides[1],
                mask=(there & (place == 0))[:, None] & inside,
                other=0.0,
            ).to(tl.float32)
        own = tl.load(
            k + row * k_strides[0] + place[:, None] * k_strides[1] + column[None, :] * k_strides[2],
            mask=there[:, None] & inside,
            other=0.0,
        ).to(tl.float32)
        before = before / query_length[:, None]
        own = own / key_length[:, None]
        of_query = (grad / query_length)[:, None] * (own - query_turned[:, None] * before)
        of_key = (grad / key_length)[:, None] * (before - key_turned[:, None] * own)
        tl.store(dq + (at - 1)[:, None] * width + column[None, :], of_query, mask=behind[:, None] & inside)
        tl.store(dk + at[:, None] * width + column[None, :], of_key, mask=there[:, None] & inside)


def _forward(
    q: Tensor, k: Tensor, begins: Tensor, valid: Tensor | None, last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> p, b, c (R, M); what `_backward` wants of each place, (3, R, M) fp32."""
    p, opens, c, kept = _like(q, k, begins, valid, last)
    rows, places, width = q.shape
    if p.numel():
        chosen = _launch("boundaries.forward", q)
        tiles = triton.cdiv(places, chosen["PLACES"])
        _forward_kernel[(rows * tiles,)](
            q,
            k,
            begins,
            valid,
            last,
            p,
            opens,
            c,
            kept,
            places,
            width,
            tiles,
            rows * places,
            q.stride(),
            k.stride(),
            begins.stride(),
            (0, 0) if valid is None else valid.stride(),
            (0, 0) if last is None else last.stride(),
            HAS_VALID=valid is not None,
            HAS_LAST=last is not None,
            **chosen,
        )
    return p, opens, c, kept


def _backward(
    dp: Tensor, dc: Tensor, q: Tensor, k: Tensor, last: Tensor | None, opens: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """-> dq and dk like q and k."""
    dq, dk = _gradients(dp, dc, q, k, last, opens, kept)
    rows, places, width = q.shape
    if dq.numel():
        chosen = _launch("boundaries.backward", q)
        tiles = triton.cdiv(places + 1, chosen["PLACES"])
        _backward_kernel[(rows * tiles,)](
            dp,
            dc,
            q,
            k,
            last,
            opens,
            kept,
            dq,
            dk,
            places,
            width,
            tiles,
            rows * places,
            dp.stride(),
            dc.stride(),
            q.stride(),
            k.stride(),
            (0, 0) if last is None else last.stride(),
            HAS_LAST=last is not None,
            **chosen,
        )
    return dq, dk


def _launch(kernel: str, q: Tensor) -> dict[str, Any]:
    width = q.shape[2]
    default = {"PLACES": 4, "WIDTH": min(512, triton.next_power_of_2(width)), "num_warps": 4}
    vary = {"PLACES": (1, 2, 4, 8, 16), "WIDTH": (128, 256, 512, 1024)}
    return launch(kernel, q.device, {"width": width, "dtype": str(q.dtype)}, default, vary)


def _like(
    q: Tensor, k: Tensor, begins: Tensor, valid: Tensor | None, last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_forward` returns, without values."""
    lead, device = q.shape[:2], q.device
    return (
        torch.empty(lead, dtype=torch.float32, device=device),
        torch.empty(lead, dtype=torch.bool, device=device),
        torch.empty(lead, dtype=torch.float32, device=device),
        torch.empty(3, *lead, dtype=torch.float32, device=device),
    )


def _gradients(dp: Tensor, dc: Tensor, q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """What `_backward` returns, without values."""
    dq, dk = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    return dq, dk


def _flops(q: Any, *args: Any, **kwargs: Any) -> int:
    return 6 * q[0] * q[1] * q[2]


_operation = opaque("boundaries", _forward, _like, flops=_flops)
_differentiated = opaque(
    "boundaries_backward", _backward, _gradients, flops=lambda dp, dc, q, *a, **k: _flops(q)
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, _, last = inputs
    _, opens, _, kept = output
    ctx.save_for_backward(q, k, last, opens, kept)
    ctx.mark_non_differentiable(opens, kept)


def _differentiate(ctx: Any, dp: Tensor, _: Any, dc: Tensor, __: Any) -> tuple[Tensor | None, ...]:
    q, k, last, opens, kept = ctx.saved_tensors
    dq, dk = _differentiated(dp, dc, q, k, last, opens, kept)
    return dq, dk, None, None, None


_operation.register_autograd(_differentiate, setup_context=_save)
