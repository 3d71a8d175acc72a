"""The definition, by a mask over all keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["reference", "selected_keys"]


def reference(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, positions: Tensor, *, block: int, scale: float
) -> Tensor:
    """q (B, T, H, h), k (B, S, G, h), v (B, S, G, w), starts (B, T, G, N), positions (B, T) -> o (B, T, H, w)."""
    exact = at_least_fp32(q.dtype)
    groups = k.shape[2]
    grouped = q.to(exact).unflatten(2, (groups, -1))  # (B, T, G, H/G, h)
    scores = scale * torch.einsum("btgjh,bsgh->btgjs", grouped, k.to(exact))
    tokens = torch.arange(k.shape[1], device=q.device)
    within = torch.zeros(*starts.shape[:3], k.shape[1], dtype=torch.bool, device=q.device)
    for start in starts[..., None].unbind(-2):  # (B, T, G, 1)
        within |= (start >= 0) & (tokens >= start) & (tokens < start + block)
    may = (within & (tokens <= positions[:, :, None, None]))[:, :, :, None]
    scores = torch.where(may, scores, -torch.inf)
    # A query without keys: its scores are -inf all, and softmax of them is nothing.
    scores = torch.where(may.any(-1, keepdim=True), scores, 0.0)
    shares = torch.where(may, scores.softmax(-1), 0.0)
    return torch.einsum("btgjs,bsgw->btgjw", shares, v.to(exact)).flatten(2, 3).to(q.dtype)


def selected_keys(starts: Tensor, positions: Tensor, keys: int, block: int) -> tuple[Tensor, Tensor]:
    """starts (..., T, G, N), positions (..., T) -> where the keys of each query are, (..., T, G, N block) int64, and
    which of these count, bool."""
    steps = torch.arange(block, device=starts.device)
    where = (starts.long()[..., None] + steps).flatten(-2)
    counts = (starts >= 0).repeat_interleave(block, dim=-1) & (where <= positions[..., None, None])
    return where.clamp(0, keys - 1), counts
