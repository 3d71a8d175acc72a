"""The definition of attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.plan import Backend, Options
from kernels.attention.visible import Visible
from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["BACKEND"]


def build(visible: Visible, options: Options) -> Tensor | None:
    return visible.allowed()


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, options: Options) -> Tensor:
    """All scores at once, everything in at least fp32."""
    stats = at_least_fp32(q.dtype)
    with own_dtypes(q.device):
        k, v = (
            t.to(stats).repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v)
        )  # (B, H, S, h)
        scores = (q.to(stats) * options.scale_of(q)) @ k.transpose(-1, -2)  # (B, H, T, S)
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        return (F.dropout(scores.softmax(-1), options.dropout) @ v).to(q.dtype)


BACKEND = Backend(build, attend)
