"""Attention of a text to a bank: queries of the text, keys and values of the bank, no positions and no order.

Keys and values do not depend on the text: they are made once in a pass, not once for each row. Where each token reads
chapters of its own, each chapter is taken with all tokens that chose it, and a token's parts are merged by their
normalisers (Milakov and Gimelshein 2018, arXiv:1805.02867): no token's keys are copied, and no scores kept.

Shapes: B rows, T tokens, H query heads, G key/value heads, e head width, N memory tokens, C chapters of P, J chapters
that a token reads, n = B T J.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels.attention import Plan, attention
from kernels.precision import at_least_fp32, compute_dtype, own_dtypes

if TYPE_CHECKING:
    from models.memory.config import MemoryConfig
    from models.memory.router import Choice

__all__ = ["MemoryAttention", "chapter_attention"]

SCORES = 2**22  # numbers that exist at a time


class LowRankLinear(nn.Module):
    """x D U, D (in, p), U (p, out)."""

    def __init__(self, into: int, rank: int, out: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(into, rank, bias=False), nn.Linear(rank, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def _projection(cfg: MemoryConfig, into: int, out: int) -> nn.Module:
    if cfg.use_low_rank_projections:
        return LowRankLinear(into, cfg.projection_rank, out)
    return nn.Linear(into, out, bias=False)


class MemoryAttention(nn.Module):
    def __init__(self, cfg: MemoryConfig) -> None:
        super().__init__()
        self.head_width, self.chapters, self.dropout = cfg.memory_head_width, cfg.num_chapters, cfg.dropout
        self.q_proj = _projection(cfg, cfg.d_model, cfg.attention_width)
        self.k_proj = _projection(cfg, cfg.token_width, cfg.memory_kv_width)
        self.v_proj = _projection(cfg, cfg.token_width, cfg.memory_kv_width)
        self.o_proj = nn.Linear(cfg.attention_width, cfg.d_model, bias=False)

    def forward(self, x: Tensor, bank: Tensor, plan: Plan | None, choice: Choice | None) -> Tensor:
        """x (B, T, D) reads all of the bank (N, m) as the plan says, or what was chosen of it -> (B, T, D)."""
        per_head = (-1, self.head_width)
        q = self.q_proj(x).unflatten(-1, per_head)  # (B, T, H, e)
        k = self.k_proj(bank).unflatten(-1, per_head)  # (N, G, e)
        v = self.v_proj(bank).unflatten(-1, per_head)
        if choice is not None:
            y = self._of_chapters(q, k, v, choice)
        else:
            assert plan is not None
            asked, keys, values = (t.transpose(0, 1)[None] for t in (q.flatten(0, 1), k, v))
            y = attention(asked, keys, values, plan)  # (1, H, B T, e): all rows as one
            y = y[0].transpose(0, 1).reshape(q.shape)
        return self.o_proj(y.flatten(2))

    def _of_chapters(self, q: Tensor, k: Tensor, v: Tensor, choice: Choice) -> Tensor:
        dtype = compute_dtype(q)
        k, v = (t.to(dtype).unflatten(0, (self.chapters, -1)) for t in (k, v))  # (C, P, G, e)
        with own_dtypes(q.device):
            dropout = self.dropout if self.training else 0.0
            y = chapter_attention(q.to(dtype), k, v, choice.chapters, choice.bias, choice.factor, dropout)
            return (y * choice.gain[..., None, None]).to(dtype)


@torch.compiler.disable
def chapter_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chapters: Tensor,
    bias: Tensor,
    factor: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """One softmax over all tokens of a token's chapters, (B, T, H, e) in at least fp32.

    q (B, T, H, e); k, v (C, P, G, e); chapters (B, T, J) int64, different ones; bias (B, T, J), of all logits of a
    chapter; factor (B, T, J), of its keys and values; dropout, of the softmax's probabilities. Differentiable in all
    but `chapters`. Waits for the device, as how many tokens chose a chapter decides shapes.
    """
    rows, length, heads, width = q.shape
    number = chapters.shape[2]
    order = chapters.flatten().argsort(stable=True)  # (n,)
    counts = chapters.flatten().bincount(minlength=len(k)).tolist()
    of_pairs = q.flatten(0, 1).index_select(0, order // number)  # (n, H, e), sorted by chapter
    if factor is not None:
        of_pairs = of_pairs * factor.flatten()[order][:, None, None].to(of_pairs.dtype)
    parts, totals = _Parts.apply(of_pairs, k, v, counts, width**-0.5, dropout)  # (n, H, e), (n, H)
    back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    pairs = (rows, length, number, heads)
    parts = parts.index_select(0, back).view(*pairs, width)
    shares = (totals.index_select(0, back).view(pairs) + bias[..., None]).softmax(2)  # (B, T, J, H)
    if factor is not None:
        shares = shares * factor[..., None]
    return (shares[..., None] * parts).sum(2)


class _Parts(torch.autograd.Function):
    """Attention of tokens to one chapter each: q (n, H, e), sorted by chapter, of which `counts` have each -> outputs
    (n, H, e) and log-normalisers (n, H), in at least fp32. Scores are made again in backward, and from its seed what
    dropout leaves of their probabilities: normalisers are those of all."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, counts: list[int], scale: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        exact = at_least_fp32(q.dtype)
        parts, totals = (
            torch.empty(q.shape, dtype=exact, device=q.device),
            q.new_empty(q.shape[:2], dtype=exact),
        )
        seed = int(torch.randint(2**62, ())) if dropout else 0
        factors = _Dropout(dropout, seed, q.device)
        for chapter, some in _pieces(counts, q.shape[1] * k.shape[1]):
            keys, values = _by_head(k[chapter]), _by_head(v[chapter])  # (G, P, e)
            scores = _scores(_grouped(q[some], keys), keys, scale, exact)  # (G, c R, P)
            total = scores.logsumexp(-1, keepdim=True)
            shares = (scores - total).exp()
            shares = (shares * factors(shares)).to(q.dtype)
            parts[some] = _ungrouped((shares @ values).to(exact), q[some])
            totals[some] = _ungrouped(total, q[some]).squeeze(-1)
        ctx.save_for_backward(q, k, v, parts, totals)
        ctx.counts, ctx.scale, ctx.dropout, ctx.seed = counts, scale, dropout, seed
        return parts, totals

    @staticmethod
    def backward(ctx: Any, dparts: Tensor, dtotals: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, parts, totals = ctx.saved_tensors
        exact = parts.dtype
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        shift = dtotals - (dparts * parts).sum(-1)  # (n, H)
        # Sums over the pieces of a chapter in at least fp32.
        of_keys: dict[int, Tensor] = {}
        of_values: dict[int, Tensor] = {}
        factors = _Dropout(ctx.dropout, ctx.seed, q.device)
        for chapter, some in _pieces(ctx.counts, q.shape[1] * k.shape[1]):
            keys, values = _by_head(k[chapter]), _by_head(v[chapter])
            asked, grads = _grouped(q[some], keys), _grouped(dparts[some].to(q.dtype), keys)  # (G, c R, e)
            total, moved = (_grouped(t[some][..., None], keys) for t in (totals, shift))  # (G, c R, 1)
            shares = (_scores(asked, keys, ctx.scale, exact) - total).exp()
            kept = factors(shares)
            dscores = shares * ((grads @ values.mT).to(exact) * kept + moved) * ctx.scale
            dscores = dscores.to(q.dtype)
            dq[some] = _ungrouped(dscores @ keys, q[some])
            for found, product in (
                (of_values, (shares * kept).to(q.dtype).mT @ grads),
                (of_keys, dscores.mT @ asked),
            ):
                found[chapter] = found[chapter] + product.to(exact) if chapter in found else product.to(exact)
        for found, into in ((of_keys, dk), (of_values, dv)):
            for chapter, gradient in found.items():
                into[chapter] = gradient.transpose(0, 1).to(into.dtype)
        return dq, dk, dv, None, None, None


class _Dropout:
    """Factors of probabilities, one call after the other: the same again from the same seed."""

    def __init__(self, p: float, seed: int, device: torch.device) -> None:
        self.p = p
        self.generator = torch.Generator(device).manual_seed(seed) if p else None

    def __call__(self, shares: Tensor) -> Tensor | float:
        if self.generator is None:
            return 1.0
        return torch.empty_like(shares).bernoulli_(1 - self.p, generator=self.generator) / (1 - self.p)


def _pieces(counts: list[int], scores: int) -> Iterator[tuple[int, slice]]:
    """Chapters, and some of their tokens: as many as have `SCORES`, at `scores` each."""
    most, first = max(1, SCORES // scores), 0
    for chapter, count in enumerate(counts):
        for at in range(first, first + count, most):
            yield chapter, slice(at, min(at + most, first + count))
        first += count


def _by_head(t: Tensor) -> Tensor:
    """(P, G, e) -> (G, P, e)"""
    return t.transpose(0, 1)


def _grouped(t: Tensor, keys: Tensor) -> Tensor:
    """(c, H, w) -> (G, c R, w), R = H / G query heads of a group."""
    return t.unflatten(1, (len(keys), -1)).transpose(0, 1).flatten(1, 2)


def _ungrouped(t: Tensor, like: Tensor) -> Tensor:
    """(G, c R, w) -> (c, H, w)"""
    return t.unflatten(1, (len(like), -1)).transpose(0, 1).flatten(1, 2)


def _scores(q: Tensor, keys: Tensor, scale: float, exact: torch.dtype) -> Tensor:
    return (q @ keys.mT).to(exact) * scale


def init_projection(module: nn.Module, std: float, draw: Any) -> None:
    """Entries of the matrix, or of the product of two, begin with `std`. `draw(tensor, std)`."""
    if isinstance(module, LowRankLinear):
        draw(module.down.weight, std)
        draw(module.up.weight, module.up.in_features**-0.5)
    else:
        draw(module.weight, std)
