"""The definition: all scores at once, everything in at least fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choose import Kernels
from kernels.patch_attention.plan import Backend, Options, Patches, behind
from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["BACKEND"]


def build(patches: Patches, options: Options, heads: int, width: int, kernels: Kernels) -> Tensor | None:
    return patches.visible.allowed()  # (B K or 1, 1, P, r + P)


def attend(
    q: Tensor, k: Tensor, v: Tensor, patches: Patches, allowed: Tensor | None, options: Options
) -> Tensor:
    exact = at_least_fp32(q.dtype)
    with own_dtypes(q.device):
        asked = q.to(exact).unflatten(1, (-1, patches.size)).flatten(0, 1).transpose(1, 2)  # (B K, H, P, h)
        known, values = (behind(t.to(exact), patches) for t in (k, v))
        scores = (asked * q.shape[3] ** -0.5) @ known.transpose(-1, -2)  # (B K, H, P, r + P)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        found = F.dropout(scores.softmax(-1), options.dropout) @ values
        return found.transpose(1, 2).reshape(q.shape).to(q.dtype)


BACKEND = Backend(build, attend)
