"""Attention without causality: every query may look at every key that its bias allows.

Shapes: B rows, T query tokens, S key tokens, H heads, h head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["additive", "bidirectional_attention"]

# On a CPU in bf16 the library's fused attention loses to plain matrix products while the probabilities are
# small. Forward and backward with a document mask, 6 heads of 32, one thread, fused : plain:
# 16 x 256 tokens 60 : 29 ms, 8 x 512 tokens 96 : 81 ms. In fp32 it wins (46 : 54 and 92 : 184 ms).
MAX_PLAIN_KEYS = 512


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask, True where allowed, as what to add to scores: 0 there, -inf elsewhere. None stays None."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(h) + bias) v for q (B, H, T, h), k and v (B, H, S, h); bias as from `additive`,
    broadcastable to (B, H, T, S)."""
    narrow = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cpu" and narrow and k.shape[2] <= MAX_PLAIN_KEYS:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, S)
        if bias is not None:
            scores = scores.add_(bias)
        # torch.softmax computes in fp32 also where it reads and writes bf16.
        return torch.softmax(scores, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=False)
