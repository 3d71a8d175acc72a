"""Block after block, with all queries that selected it: keys and values are read where they lie, and products have as
many rows as there are such queries times heads. Results of a query's blocks are joined as they come, as by the kernels;
gradients are by formula, probabilities are made again.

Shapes: B rows, T queries, C of them at a time, S keys, H heads in G groups of R, h width of keys, w of values, N blocks
of L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["by_blocks"]

SCORES_BYTES = 512 * 1024  # of scores that exist at once: they stay in a cache


def by_blocks(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, positions: Tensor, *, block: int, scale: float
) -> Tensor:
    """Arguments and result as `reference`."""
    with own_dtypes(q.device):
        return _ByBlocks.apply(q, k.to(q.dtype), v.to(q.dtype), starts, positions, block, scale)


class _ByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, positions: Tensor, block: int, scale: float
    ) -> Tensor:
        batch, queries, heads, _ = q.shape
        exact = at_least_fp32(q.dtype)
        o = q.new_empty(batch, queries, heads, v.shape[3])
        totals = q.new_empty(batch, queries, heads, dtype=exact)  # logarithms of sums of exponentials
        for row, group, own in _lists(q, k):
            asked = q[row, :, own].contiguous()  # what is fetched of it lies in one piece each
            keys, values = k[row, :, group], v[row, :, group]
            largest = torch.full((queries, own.stop - own.start), -torch.inf, dtype=exact)
            total = torch.zeros_like(largest)
            found = torch.zeros(*largest.shape, v.shape[3], dtype=exact)
            for some, tokens in _selecting(starts[row, :, group], k.shape[1], block, largest.shape[1], exact):
                scores = _scores(
                    asked.index_select(0, some), keys[tokens], positions[row, some], tokens, scale, exact
                )
                before = largest[some]
                now = torch.maximum(before, scores.amax(-1))
                shares = scores.sub_(_finite(now)[..., None]).exp_()
                left = before.sub_(_finite(now)).exp_()
                largest.index_copy_(0, some, now)
                total.index_copy_(0, some, total[some].mul_(left).add_(shares.sum(-1)))
                added = (shares.to(q.dtype).flatten(0, 1) @ values[tokens]).view(*left.shape, -1)
                found.index_copy_(0, some, found.index_select(0, some).mul_(left[..., None]).add_(added))
            none = total == 0
            o[row, :, own] = found.div_(total.masked_fill(none, 1.0)[..., None])
            totals[row, :, own] = largest.add_(total.masked_fill_(none, 1.0).log_())
        ctx.save_for_backward(q, k, v, starts, positions, o, totals)
        ctx.block, ctx.scale = block, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts, positions, o, totals = ctx.saved_tensors
        (do,) = gradients
        exact = totals.dtype
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        with own_dtypes(q.device):
            reached = (do.to(exact) * o.to(exact)).sum(-1)  # (B, T, H)
            totals = _finite(totals)
            for row, group, own in _lists(q, k):
                asked, grads = (t[row, :, own].contiguous() for t in (q, do))
                keys, values = k[row, :, group], v[row, :, group]
                total, sums = totals[row, :, own], reached[row, :, own]
                of_queries = torch.zeros(asked.shape, dtype=exact)
                of_keys, of_values = (torch.zeros(t.shape, dtype=exact) for t in (keys, values))
                for some, tokens in _selecting(
                    starts[row, :, group], k.shape[1], ctx.block, asked.shape[1], exact
                ):
                    here, grad = asked.index_select(0, some), grads.index_select(0, some).flatten(0, 1)
                    scores = _scores(here, keys[tokens], positions[row, some], tokens, ctx.scale, exact)
                    shares = scores.sub_(total[some][..., None]).exp_().flatten(0, 1)  # (C R, L)
                    of_values[tokens] += shares.to(q.dtype).mT @ grad
                    dshares = (grad @ values[tokens].mT).to(exact).sub_(sums[some].flatten()[:, None])
                    dscores = shares.mul_(dshares).mul_(ctx.scale).to(q.dtype)
                    of_keys[tokens] += dscores.mT @ here.flatten(0, 1)
                    of_queries.index_add_(0, some, (dscores @ keys[tokens]).to(exact).view(here.shape))
                dq[row, :, own], dk[row, :, group], dv[row, :, group] = of_queries, of_keys, of_values
        return dq, dk, dv, None, None, None, None


def _lists(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Rows, groups, and the heads of these."""
    share = q.shape[2] // k.shape[2]
    for row in range(len(q)):
        for group in range(k.shape[2]):
            yield row, group, slice(group * share, (group + 1) * share)


def _selecting(
    starts: Tensor, keys: int, block: int, share: int, exact: torch.dtype
) -> Iterator[tuple[Tensor, slice]]:
    """starts (T, N) -> some of the queries that selected a block, (C,), and the block's tokens."""
    most = max(1, SCORES_BYTES // (share * block * exact.itemsize))
    ordered, pairs = starts.flatten().sort(stable=True)
    begins, counts = ordered.unique_consecutive(return_counts=True)
    first = 0
    for begin, count in zip(begins.tolist(), counts.tolist(), strict=True):
        if begin >= 0:
            for at in range(first, first + count, most):
                some = pairs[at : min(at + most, first + count)] // starts.shape[1]
                yield some, slice(begin, min(begin + block, keys))
        first += count


def _scores(
    q: Tensor, k: Tensor, positions: Tensor, tokens: slice, scale: float, exact: torch.dtype
) -> Tensor:
    """q (C, R, h), k (L, h) -> (C, R, L), -inf for tokens behind the query."""
    scores = (q.flatten(0, 1) @ k.mT).to(exact).mul_(scale).view(*q.shape[:2], -1)
    behind = positions < tokens.stop - 1
    if behind.any():
        after = torch.arange(tokens.start, tokens.stop) > positions[:, None]
        scores.masked_fill_(after[:, None], -torch.inf)
    return scores


def _finite(total: Tensor) -> Tensor:
    return total.masked_fill(total == -torch.inf, 0.0)
