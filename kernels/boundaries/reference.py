"""The definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["reference", "sureness"]


def reference(
    q: Tensor, k: Tensor, begins: Tensor, valid: Tensor | None, last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k (R, M, D), begins and valid (R, M) bool, last (R, D) -> p, b, c (R, M)."""
    exact = at_least_fp32(q.dtype)
    with own_dtypes(q.device):
        q, k = (F.normalize(t.to(exact), dim=-1) for t in (q, k))
        if last is None:
            before = q.roll(1, 1)
            begins = begins | (torch.arange(q.shape[1], device=q.device) == 0)
        else:
            first = F.normalize(last.detach().to(exact), dim=-1)
            before = torch.cat((first[:, None], q), 1)[:, :-1]
        p = ((1 - (before * k).sum(-1)) / 2).clamp(0, 1).masked_fill(begins, 1.0)
    opens, c = sureness(p, valid)
    return p, opens, c


def sureness(p: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """p (R, M) -> what it decides, bool, and how sure it was of that: p where it opened a chunk, 1 - p elsewhere."""
    opens = p > 0.5
    if valid is not None:
        opens = opens & valid
    return opens, torch.where(opens, p, 1 - p)
