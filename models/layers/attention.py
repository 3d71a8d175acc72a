"""Causal attention within documents, for any number of query and key/value heads.

Shapes: B rows, T query tokens, S key tokens (S >= T: the last T of them are the queries'), H query heads,
G key/value heads, h head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention", "attention_bias"]

# On a CPU in bf16 the library's fused attention loses to plain matrix products on blocks of queries that skip
# the keys of the future. Forward and backward with a document mask, D = 192, 6 heads, one thread, fused :
# blocked : plain without blocks: 16 x 256 tokens 60 : 26 : 30 ms, 8 x 512 tokens 96 : 43 : 86 ms. In fp32 it
# is a draw (45 : 47 : 54 and 91 : 74 : 186), and longer rows would store too many probabilities.
QUERY_BLOCK = 128
MAX_BLOCKED_KEYS = 512


def attention_bias(
    queries: int,
    keys: int,
    *,
    doc_ids: Tensor | None = None,
    window: int | None = None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor | None:
    """What to add to attention scores, (B or 1, 1, T, S): 0 where a query may look, -inf elsewhere.

    A query sees itself and what lies before it, of the same document if `doc_ids` (B, T) is given, at most
    `window` tokens in all. None stands for plain causality, for which no tensor is needed. Made once per
    forward pass, in the dtype of the queries, and shared by the layers.
    """
    if window is not None and window >= keys:
        window = None
    if doc_ids is None and window is None and queries in (keys, 1):
        return None
    query = torch.arange(keys - queries, keys, device=device)[:, None]  # (T, 1)
    key = torch.arange(keys, device=device)  # (S,)
    allowed = key <= query
    if window is not None:
        allowed = allowed & (query - key < window)
    allowed = allowed[None, None]  # (1, 1, T, S)
    if doc_ids is not None:
        allowed = allowed & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -torch.inf)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(h) + bias) v for q (B, H, T, h), k and v (B, G, S, h); returns (B, H, T, h).

    Query head j reads key/value head floor(j G / H) (Ainslie et al. 2023). `bias` comes from
    `attention_bias`. `softcap` c turns scores s into c tanh(s / c) (Gemma Team 2024, section 2).
    `dropout` acts on the probabilities; pass 0 outside training.
    """
    on_cpu = q.device.type == "cpu"
    narrow = q.dtype in (torch.bfloat16, torch.float16)
    blocked_is_faster = on_cpu and narrow and q.shape[2] > 1 and k.shape[2] <= MAX_BLOCKED_KEYS
    # With dropout the library's CPU kernel builds all scores at once; p = 1 it refuses.
    if softcap is not None or blocked_is_faster or (dropout > 0 and on_cpu) or dropout == 1:
        return _blocked_attention(q, k, v, bias, softcap, dropout)
    grouped = q.shape[1] != k.shape[1]
    if grouped and bias is not None:
        # Fused kernels take a bias or grouped heads, not both. These copies die with this call.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        grouped = False
    causal = bias is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    )


def _blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softcap: float | None, dropout: float
) -> Tensor:
    """`attention` in plain operations, one block of queries after another against the keys up to its end."""
    queries, keys = q.shape[2], k.shape[2]
    if bias is None and queries > 1:
        one_document = torch.zeros(1, queries, dtype=torch.int32, device=q.device)
        bias = attention_bias(queries, keys, doc_ids=one_document, device=q.device, dtype=q.dtype)
    q = q * q.shape[-1] ** -0.5
    outputs = []
    for start in range(0, queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, queries)
        seen = keys - queries + end
        block_bias = None if bias is None else bias[:, :, start:end, :seen]
        outputs.append(
            _plain_attention(q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], block_bias, softcap, dropout)
        )
    return torch.cat(outputs, dim=2)


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softcap: float | None, dropout: float
) -> Tensor:
    """One block; q is already scaled."""
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    # The query heads of a group stand below each other: one product per key/value head, nothing repeated.
    q = q.reshape(batch, groups, -1, width)  # (B, G, H/G * T, h)
    scores = (q @ k.transpose(-1, -2)).view(batch, heads, queries, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores.to(torch.promote_types(scores.dtype, torch.float32)) / softcap)
    if bias is not None:
        scores = scores.add_(bias)
    # torch.softmax computes in fp32 also where it reads and writes bf16.
    probabilities = F.dropout(torch.softmax(scores, dim=-1), dropout).to(v.dtype)
    return (probabilities.view(batch, groups, -1, keys) @ v).view(batch, heads, queries, v.shape[-1])
