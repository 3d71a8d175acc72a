"""Attention to learned summaries of blocks (Yuan et al. 2025, equations 7 and 8)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["probabilities", "visible"]


def visible(starts: Tensor, begin: Tensor, size: int, past: int = 0) -> Tensor:
    """(B, T, N): whether a query sees a compressed block: it is of its document and ends no later than the query.

    starts (B, N) of `block_starts`, of blocks of `size` tokens; begin (B, T) of queries, the first of them at `past`.
    """
    where = torch.arange(past, past + begin.shape[1], device=begin.device)[:, None]
    at = starts[:, None, :]
    return (at >= begin[:, :, None]) & (at + size - 1 <= where)


def probabilities(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """How much of its attention a query gives to each summary: (B, T, G, H / G, N); 0 for one that sees no block.

    q (B, T, H, h), summaries k (B, N, G, h), seen (B, T, N) of `visible`.
    """
    grouped = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("btghd,bngd->btghn", grouped, k) * q.shape[3] ** -0.5
    hidden = ~seen[:, :, None, None]
    # The lowest finite number, not -inf: where a query sees nothing, no NaN arises even in between.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(hidden, lowest).softmax(-1).masked_fill(hidden, 0.0)
