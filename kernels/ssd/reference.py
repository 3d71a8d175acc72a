"""The definition of state-space duality: a recurrence, token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import runs
from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["reference"]


def reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    doc_ids: Tensor | None,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """x (B, T, H, P), delta (B, T, H), A (H,), B and C (B, T, G, N), D and delta_bias (H,), initial (B, H, P, N),
    doc_ids (B, T) -> y (B, T, H, P) in x's dtype, the last states (B, H, P, N); in at least fp32. There are no chunks.
    """
    exact = at_least_fp32(x.dtype)
    rows, tokens, heads, width = x.shape
    steps = F.softplus(delta.to(exact) + (0.0 if delta_bias is None else delta_bias.to(exact)))  # (B, T, H)
    decay = (steps * A.to(exact)).exp()
    if doc_ids is not None:
        begins = F.pad(runs(doc_ids).diff(dim=1) > 0, (1, 0))
        decay = decay.masked_fill(begins[..., None], 0)
    into, out = (t.to(exact).repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))  # (B, T, H, N)
    wide = x.to(exact)
    state = (
        x.new_zeros(rows, heads, width, B.shape[-1], dtype=exact) if initial is None else initial.to(exact)
    )
    found = []
    with own_dtypes(x.device):
        for t in range(tokens):
            entering = (steps[:, t, :, None] * wide[:, t])[..., None] * into[:, t, :, None]  # (B, H, P, N)
            state = decay[:, t, :, None, None] * state + entering
            found.append((state * out[:, t, :, None]).sum(-1))
    y = torch.stack(found, dim=1)
    if D is not None:
        y = y + D.to(exact)[:, None] * wide
    return y.to(x.dtype), state
