"""Attention without causality: every query may look at every key that its bias allows.

Shapes: B rows, T query tokens, S key tokens, H heads, h head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Range", "Sparse", "additive", "bidirectional_attention"]

# On a CPU in bf16 the library's fused attention loses to plain matrix products while the probabilities are
# small. Forward and backward with a document mask, 6 heads of 32, one thread, fused : plain:
# 16 x 256 tokens 60 : 29 ms, 8 x 512 tokens 96 : 81 ms. In fp32 it wins (46 : 54 and 92 : 184 ms).
MAX_PLAIN_KEYS = 512


Range = tuple[int, int]


@overload
def additive(mask: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def additive(mask: None, dtype: torch.dtype) -> None: ...
@overload
def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask, True where allowed, as what to add to scores: 0 there, -inf elsewhere. None stays None."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


class Sparse(NamedTuple):
    """A mask by groups of queries, each with the ranges of keys that any of its queries may look at.

    queries: (start, end) of each group; those in no group get no result. keys: of each group, the (start, end) of its
    ranges. biases: of each group, as from `additive`, (B or 1, 1, T', S') over the queries and keys of the group.
    """

    queries: Sequence[Range]
    keys: Sequence[Sequence[Range]]
    biases: Sequence[Tensor]

    @classmethod
    def of(
        cls, mask: Tensor, queries: Sequence[Range], keys: Sequence[Sequence[Range]], dtype: torch.dtype
    ) -> Sparse:
        """mask (B or 1, 1, T, S) bool, which must be False outside of the groups' keys."""
        biases = []
        for (start, end), ranges in zip(queries, keys, strict=True):
            biases.append(additive(_ranges(mask[:, :, start:end], ranges, 3), dtype))
        return cls(queries, keys, biases)


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | Sparse | None) -> Tensor:
    """softmax(q k^T / sqrt(h) + bias) v for q (B, H, T, h), k and v (B, H, S, h); bias as from `additive`,
    broadcastable to (B, H, T, S). A `Sparse` bias: one group of queries after another, nothing computed outside
    of their keys, and a result for the queries of its groups only."""
    if isinstance(bias, Sparse):
        groups = [
            bidirectional_attention(q[:, :, start:end], _ranges(k, keys, 2), _ranges(v, keys, 2), part)
            for (start, end), keys, part in zip(*bias, strict=True)
        ]
        return torch.cat(groups, dim=2)
    narrow = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cpu" and narrow and k.shape[2] <= MAX_PLAIN_KEYS:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, S)
        if bias is not None:
            scores = scores.add_(bias)
        # torch.softmax computes in fp32 also where it reads and writes bf16.
        return torch.softmax(scores, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=False)


def _ranges(x: Tensor, ranges: Sequence[Range], dim: int) -> Tensor:
    return torch.cat([x.narrow(dim, start, end - start) for start, end in ranges], dim)
