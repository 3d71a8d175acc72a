"""Attention to learned summaries of blocks (Yuan et al. 2025, equations 7 and 8)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compressed_attention", "visible"]


def visible(starts: Tensor, begin: Tensor, size: int) -> Tensor:
    """(B, T, N): whether a query sees a compressed block: it is of its document and ends no later than the query.

    starts (B, N) of `block_starts`, of blocks of `size` tokens; begin (B, T).
    """
    where = torch.arange(begin.shape[1], device=begin.device)[:, None]
    at = starts[:, None, :]
    return (at >= begin[:, :, None]) & (at + size - 1 <= where)


def compressed_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """o (B, T, H, w) and probabilities (B, T, G, H / G, N); both 0 for a query that sees no block.

    q (B, T, H, h), summaries k (B, N, G, h) and v (B, N, G, w), seen (B, T, N) of `visible`.
    """
    rows, queries, heads, width = q.shape
    groups = k.shape[2]
    grouped = q.reshape(rows, queries, groups, heads // groups, width)
    scores = torch.einsum("btghd,bngd->btghn", grouped, k) * width**-0.5
    hidden = ~seen[:, :, None, None]
    # The lowest finite number, not -inf: where a query sees nothing, no NaN arises even in between.
    lowest = torch.finfo(scores.dtype).min
    probabilities = scores.masked_fill(hidden, lowest).softmax(-1).masked_fill(hidden, 0.0)
    o = torch.einsum("btghn,bngw->btghw", probabilities, v)
    return o.reshape(rows, queries, heads, v.shape[3]), probabilities
