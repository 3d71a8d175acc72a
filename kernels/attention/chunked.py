"""Attention of one block of queries after another, each against the keys that it may see, in plain operations or by the
library's fused ones, whichever are faster for so many. Where queries see a window, no tensor has a number for every
query and key.

On a CPU in bf16 the library's fused attention loses to plain matrix products. Forward and backward with a document
mask, D = 192, 6 heads, one thread, fused : blocked : plain without blocks: 16 x 256 tokens 60 : 26 : 30 ms, 8 x 512
tokens 96 : 43 : 86 ms. In fp32 it is a draw (45 : 47 : 54 and 91 : 74 : 186), and longer rows would store too many
probabilities. Without causality, fused : plain: 60 : 29 and 96 : 81 ms in bf16, 46 : 54 and 92 : 184 ms in fp32. Of a
window in longer rows, fused : blocked, on a busy machine: 4 x 1,024 tokens, a window of 128, 262 : 145 ms in bf16, 259
: 138 in fp32; 4,096 tokens, a window of 512, 1,251 : 843 and 1,380 : 472, and the masks for it 393 : 26 ms.

Shapes: B rows, T queries, S keys, H query heads, G key/value heads, h head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.block_diffusion import Sparse, one_pass_groups, ranges_of
from kernels.attention.plan import Backend, Options
from kernels.attention.visible import MAX_PLAIN_KEYS, QUERY_BLOCK, Visible

__all__ = ["BACKEND", "Block", "Built", "plain_is_faster"]


class Block(NamedTuple):
    """Some queries, and what these see at most; `bias` (B or 1, 1, queries, keys)."""

    queries: slice
    keys: slice
    bias: Tensor | None


Built = list[Block] | Sparse


def plain_is_faster(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Than the library's fused attention, up to `MAX_PLAIN_KEYS` keys."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def build(visible: Visible, options: Options) -> Built:
    if visible.pattern is not None:
        mask = visible.pattern.mask(visible.doc_ids)
        return one_pass_groups(mask, visible.pattern.longest, options.dtype, visible.pattern.noisy_only)
    if not visible.causal:
        everything = slice(0, visible.queries), slice(0, visible.keys)
        return [Block(*everything, visible.bias(options.dtype))]
    blocks = []
    for start in range(0, visible.queries, QUERY_BLOCK):
        queries = slice(start, min(start + QUERY_BLOCK, visible.queries))
        keys = visible.reach(queries)
        blocks.append(Block(queries, keys, visible.bias(options.dtype, queries, keys)))
    return blocks


def attend(q: Tensor, k: Tensor, v: Tensor, built: Built, options: Options) -> Tensor:
    if isinstance(built, Sparse):
        groups = [
            _group(q[:, :, start:end], ranges_of(k, keys, 2), ranges_of(v, keys, 2), bias, options)
            for (start, end), keys, bias in zip(*built, strict=True)
        ]
    else:
        groups = [
            _group(q[:, :, queries], k[:, :, keys], v[:, :, keys], bias, options)
            for queries, keys, bias in built
        ]
    return torch.cat(groups, dim=2) if len(groups) > 1 else groups[0]


def _group(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """Queries that look at the same keys: whichever way is faster for so many."""
    library = options.softcap is None and options.dropout == 0
    if library and not (plain_is_faster(q.device, q.dtype) and k.shape[2] <= MAX_PLAIN_KEYS):
        if q.shape[1] != k.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=options.scale)
    return _plain(q * options.scale_of(q), k, v, bias, options)


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """q is already scaled."""
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    # The query heads of a group stand below each other: one product per key/value head, nothing repeated.
    together = heads // groups * queries
    q = q.reshape(batch, groups, together, width)  # (B, G, H/G * T, h)
    scores = (q @ k.transpose(-1, -2)).view(batch, heads, queries, keys)
    if (softcap := options.softcap) is not None:
        scores = softcap * torch.tanh(scores.to(torch.promote_types(scores.dtype, torch.float32)) / softcap)
    if bias is not None:
        scores = scores.add_(bias)
    # torch.softmax computes in fp32 also where it reads and writes bf16.
    probabilities = F.dropout(torch.softmax(scores, dim=-1), options.dropout).to(v.dtype)
    return (probabilities.view(batch, groups, together, keys) @ v).view(batch, heads, queries, v.shape[-1])


BACKEND = Backend(build, attend)
