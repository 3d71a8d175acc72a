"""The selected keys of each query, fetched side by side, some queries at a time: no tensor has a score of every query
and every key. The gradient is by formula, probabilities are made again.

Shapes: B rows, T queries, C of them at a time, S keys, H heads in G groups, h width of keys, w of values, N blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.precision import at_least_fp32, own_dtypes
from kernels.selected_attention.reference import selected_keys

__all__ = ["gathered"]

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}  # of keys that are fetched at once


def gathered(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, positions: Tensor, *, block: int, scale: float
) -> Tensor:
    """Arguments and result as `reference`."""
    with own_dtypes(q.device):
        return _Gathered.apply(q, k.to(q.dtype), v.to(q.dtype), starts, positions, block, scale)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, positions: Tensor, block: int, scale: float
    ) -> Tensor:
        rows, queries, heads, _ = q.shape
        exact = at_least_fp32(q.dtype)
        o = q.new_empty(rows, queries, heads, v.shape[3])
        totals = q.new_empty(rows, queries, k.shape[2], heads // k.shape[2], 1, dtype=exact)
        for row, some in _chunks(k, starts, block):
            where, counts = selected_keys(starts[row, some], positions[row, some], k.shape[1], block)
            asked = _by_group(q[row, some], k)
            found, totals[row, some] = _attend(
                asked, _fetched(k[row], where), _fetched(v[row], where), counts[:, :, None], scale, exact
            )
            o[row, some] = found.flatten(1, 2)
        ctx.save_for_backward(q, k, v, starts, positions, o, totals)
        ctx.block, ctx.scale = block, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts, positions, o, totals = ctx.saved_tensors
        (do,) = gradients
        exact = totals.dtype
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(t.shape, dtype=exact, device=t.device) for t in (k, v))
        with own_dtypes(q.device):
            for row, some in _chunks(k, starts, ctx.block):
                where, counts = selected_keys(starts[row, some], positions[row, some], k.shape[1], ctx.block)
                asked, out, dout = (_by_group(t[row, some], k) for t in (q, o, do))
                keys, values = _fetched(k[row], where), _fetched(v[row], where)
                dasked, dkeys, dvalues = _attend_back(
                    asked, keys, values, counts[:, :, None], ctx.scale, totals[row, some], out, dout
                )
                dq[row, some] = dasked.flatten(1, 2)
                _put_back(dk[row], where, dkeys)
                _put_back(dv[row], where, dvalues)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _chunks(k: Tensor, starts: Tensor, block: int) -> Iterator[tuple[int, slice]]:
    """Rows, and queries of them that are computed at once."""
    rows, queries, groups, count = starts.shape
    budget = CHUNK_BYTES.get(k.device.type, CHUNK_BYTES["cuda"])
    some = max(1, budget // max(1, groups * count * block * k.shape[3] * k.element_size()))
    for row in range(rows):
        for first in range(0, queries, some):
            yield row, slice(first, min(first + some, queries))


def _by_group(t: Tensor, k: Tensor) -> Tensor:
    """(C, H, h) -> (C, G, H/G, h)."""
    return t.unflatten(1, (k.shape[2], -1))


def _fetched(t: Tensor, where: Tensor) -> Tensor:
    """t (S, G, h) -> (C, G, N block, h)."""
    groups = torch.arange(t.shape[1], device=t.device)[:, None]
    return t[where, groups]


def _put_back(total: Tensor, where: Tensor, found: Tensor) -> None:
    """found (C, G, N block, h) added to total (S, G, h). What does not count is 0."""
    groups = torch.arange(total.shape[1], device=total.device)[:, None]
    flat = (where * total.shape[1] + groups).flatten()
    total.view(-1, total.shape[2]).index_add_(0, flat, found.flatten(0, 2).to(total.dtype))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, scale: float, exact: torch.dtype
) -> tuple[Tensor, Tensor]:
    """q (..., R, h), k (..., L, h), v (..., L, w), counts (..., 1, L) -> o (..., R, w) in q's dtype, and the logarithm
    of the sum of exponentials (..., R, 1), in `exact`: -inf where no key counts, and o is 0."""
    scores = _scores(q, k, counts, scale, exact)
    total = scores.logsumexp(-1, keepdim=True)
    shares = (scores - _finite(total)).exp_().to(q.dtype)
    return shares @ v, total


def _attend_back(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, scale: float, total: Tensor, o: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of q, k and v, in their dtype."""
    exact = total.dtype
    shares = _scores(q, k, counts, scale, exact).sub_(_finite(total)).exp_()  # (..., R, L)
    dv = shares.to(q.dtype).mT @ do
    dshares = (do @ v.mT).to(exact)
    dshares -= (do.to(exact) * o.to(exact)).sum(-1, keepdim=True)
    dscores = (shares.mul_(dshares)).mul_(scale).to(q.dtype)
    return dscores @ k, dscores.mT @ q, dv


def _scores(q: Tensor, k: Tensor, counts: Tensor, scale: float, exact: torch.dtype) -> Tensor:
    return (q @ k.mT).to(exact).mul_(scale).masked_fill_(~counts, -torch.inf)


def _finite(total: Tensor) -> Tensor:
    return total.masked_fill(total == -torch.inf, 0.0)
