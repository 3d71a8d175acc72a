"""Attention within documents and windows by torch's `varlen_attn`, which is FlashAttention: no mask is ever made."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.nn.attention import varlen

from kernels.attention.offsets import Built, build, joined, rows_again
from kernels.attention.plan import Backend, Options

__all__ = ["BACKEND"]


# An option of later versions; before, keys and values are repeated.
GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def attend(q: Tensor, k: Tensor, v: Tensor, built: Built, options: Options) -> Tensor:
    more: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if GROUPED_HEADS:
            more["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    found: Any = varlen.varlen_attn(
        joined(q),
        joined(k),
        joined(v),
        built.queries,
        built.keys,
        built.longest_queries,
        built.longest_keys,
        scale=options.scale,
        window_size=built.window,
        **more,
    )
    return rows_again(found, q.shape[0])


BACKEND = Backend(build, attend)
