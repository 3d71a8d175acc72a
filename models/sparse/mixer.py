"""Attention in three branches, each a softmax of its own: to summaries of all blocks, to the tokens of the blocks that
these rank highest, and to the last tokens (Yuan et al. 2025, "Native Sparse Attention", arXiv:2502.11089, section 3).

    q = W_q x;  k, v of each branch;  o = sum over branches c of g_c Attention(q, k_c, v_c);  y = W_o o

Shapes: B rows, T queries, S tokens of their rows so far, D width, H query heads in G groups, h width of queries and
keys, w of values, N summaries, M blocks to select from, n selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Plan, Visible, attention, plan_attention
from kernels.choose import Kernels, UsesKernels
from kernels.library import opaque
from kernels.precision import at_least_fp32, own_dtypes
from kernels.qk_norm_rope import qk_norm_rope, rotation_call
from kernels.selected_attention import selected_attention, selected_call
from models.layers.decoder import document_positions
from models.layers.recompute import Kept, keep
from models.layers.rotary import rotary_tables
from models.sparse.blocks import block_starts, capacity, overlap
from models.sparse.cache import SparseCache
from models.sparse.compression import probabilities, visible
from models.sparse.config import NSAConfig
from models.sparse.gates import Gates
from models.sparse.selection import importance, select
from models.sparse.summaries import Mean, Summary

__all__ = ["Layout", "Ranking", "SparseAttention", "layout_of"]

SCORES_AT_ONCE = 2**22  # of queries and summaries, while blocks are ranked: what a CPU's cache holds


@dataclass(frozen=True, eq=False)
class Layout:
    """What all layers of a forward pass share, for T queries behind `past` other tokens.

    `begin` (B, T): where the queries' documents begin. `summed` (B, N), `selectable` (B, M): first tokens of blocks;
    `weights` (B, N, M) of `overlap`. `new` (B, N'): those of the blocks that are summed up in this pass, counted from
    the `skip`-th of the tokens that come with it, as `new_begin` (B, S') is. `summaries`: None where there is none;
    `lonely` (B, T): who sees none.
    """

    past: int
    begin: Tensor
    summed: Tensor
    selectable: Tensor
    weights: Tensor
    new: Tensor
    new_begin: Tensor
    skip: int
    summaries: Plan | None
    lonely: Tensor
    window: Plan
    rotation: tuple[Tensor, Tensor]


def _begin(tokens: int, doc_ids: Tensor | None, like: Tensor) -> Tensor:
    """(B, S): positions of the first tokens of documents."""
    if doc_ids is None:
        return torch.zeros(len(like), tokens, dtype=torch.int64, device=like.device)
    return torch.arange(tokens, device=like.device) - document_positions(doc_ids)


def layout_of(
    cfg: NSAConfig,
    tokens: Tensor,
    past: int,
    doc_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    kernels: Kernels,
) -> Layout:
    """Of tokens (B, T) behind `past` others; `dtype` of queries, keys and values."""
    rows, queries = tokens.shape
    size, stride, block = cfg.compress_block_size, cfg.stride, cfg.selection_block_size
    begin = _begin(past + queries, doc_ids, tokens)  # (B, S)
    summed, selectable = block_starts(begin, size, stride), block_starts(begin, block, block)
    # A cache is of one document. It keeps size - 1 tokens unsummed at most, of blocks that begin behind `old`.
    known = capacity(past, size, stride)
    old = known * stride
    own = begin[:, past:]
    seen = visible(summed, own, size, past)
    lonely = ~seen.any(-1)
    options: dict[str, Any] = {
        "dtype": dtype,
        "heads": (cfg.n_heads, cfg.n_kv_heads),
        "width": max(cfg.head_dim, cfg.value_dim),
        "scale": cfg.head_dim**-0.5,
        "kernels": kernels,
    }
    summaries = None
    if summed.shape[1]:
        # Who sees none looks at the first, and is told 0.
        first = torch.arange(summed.shape[1], device=tokens.device) == 0
        mask = (seen | (lonely[..., None] & first))[:, None]
        summaries = plan_attention(
            Visible(rows, queries, summed.shape[1], tokens.device, causal=False, mask=mask), **options
        )
    behind = min(past, cfg.sliding_window - 1)
    last = Visible.causally(tokens, behind, window=cfg.sliding_window, doc_ids=doc_ids, cu_seqlens=cu_seqlens)
    index = torch.arange(past, past + queries, device=tokens.device)
    if cfg.compress_rope and doc_ids is not None:
        # A summary of turned keys is no function of distances alone.
        index = index - own
    return Layout(
        past=past,
        begin=own,
        summed=summed,
        selectable=selectable,
        weights=overlap(summed, selectable, size, stride, block).to(at_least_fp32(dtype)),
        new=summed[:, known:] - old if past else summed,
        new_begin=begin[:, old:] if past else begin,
        skip=old - max(0, past - (size - 1)),
        summaries=summaries,
        lonely=lonely,
        window=plan_attention(last, **options),
        rotation=rotary_tables(index, cfg.turning, cfg.rope_theta, dtype),
    )


def _rank(
    q: Tensor,
    k: Tensor,
    summed: Tensor,
    selectable: Tensor,
    begin: Tensor,
    weights: Tensor,
    size: int,
    block: int,
    count: int,
    first: int,
    local: int,
    past: int,
) -> Tensor:
    """Where the selected blocks begin (B, T, G, n): some queries at a time, so that no tensor has a probability of
    every query and summary. q (B, T, H, h), summaries k (B, N, G, h). In at least fp32."""
    exact = at_least_fp32(q.dtype)
    rows, queries, heads, _ = q.shape
    some = max(1, SCORES_AT_ONCE // max(1, rows * heads * k.shape[1]))
    chosen = []
    with own_dtypes(q.device):
        k = k.to(exact)
        for start in range(0, queries, some):
            part = slice(start, start + some)
            of_part = begin[:, part]
            seen = visible(summed, of_part, size, past + start)
            scores = importance(probabilities(q[:, part].to(exact), k, seen), weights.to(exact))
            chosen.append(
                select(
                    scores,
                    selectable,
                    of_part,
                    block=block,
                    count=count,
                    first=first,
                    local=local,
                    past=past + start,
                )
            )
    return torch.cat(chosen, 1)


def _like_rank(q: Tensor, k: Tensor, summed: Tensor, selectable: Tensor, *args: Any) -> Tensor:
    count = args[4]
    shape = (*q.shape[:2], k.shape[2], min(count, selectable.shape[1] + 1))
    return torch.empty(shape, dtype=torch.int32, device=q.device)


def _rank_flops(q: tuple[int, ...], k: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Scores; what they are summed up to is as good as nothing."""
    return 2 * q[0] * q[1] * q[2] * q[3] * k[1]


# Indices stay in memory where activations are computed anew: rounding might choose others.
_select_blocks = keep(opaque("select_blocks", _rank, _like_rank, flops=_rank_flops))


class Ranking(Kept):
    """Which blocks a query attends to. Nothing learns through it."""

    def __init__(self, cfg: NSAConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def forward(self, q: Tensor, summaries: Tensor, layout: Layout) -> Tensor:  # type: ignore[override]
        """Where the selected blocks begin (B, T, G, n) int32, ascending, -1 for none; q (B, T, H, h), summaries of keys
        (B, N, G, h)."""
        c = self.cfg
        starts: Tensor = _select_blocks(
            q.detach(),
            summaries.detach(),
            layout.summed,
            layout.selectable,
            layout.begin,
            layout.weights,
            c.compress_block_size,
            c.selection_block_size,
            c.num_selected_blocks,
            c.num_init_blocks,
            c.num_local_blocks,
            layout.past,
        )
        return starts


class SparseAttention(UsesKernels):
    """`forward` gives what attention adds to the residual stream."""

    def __init__(self, cfg: NSAConfig, layer: int) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        groups, key, value = cfg.n_kv_heads, cfg.head_dim, cfg.value_dim
        self.q_proj = nn.Linear(cfg.d_model, cfg.n_heads * key, bias=False)
        # Of each branch in turn: compressed, selected, window.
        self.k_proj = nn.Linear(cfg.d_model, cfg.projections * groups * key, bias=False)
        self.v_proj = nn.Linear(cfg.d_model, cfg.projections * groups * value, bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * value, cfg.d_model, bias=False)
        self.g_proj = Gates(cfg.d_model, cfg.gate_hidden_dim, cfg.n_heads, cfg.gate_bias_init)
        self.compress_k, self.compress_v = self._summary(key), self._summary(value)
        self.ranking = Ranking(cfg)

    def _summary(self, width: int) -> Summary | Mean:
        c = self.cfg
        if c.compression == "mean":
            return Mean(c.compress_block_size)
        return Summary(width, c.compress_mlp_ratio * width, c.n_kv_heads, c.compress_block_size, c.stride)

    def forward(self, x: Tensor, layout: Layout, cache: SparseCache | None = None) -> Tensor:
        """(B, T, D) of x (B, T, D), already normalised."""
        return self._joined(x, self._branches(*self._projected(x), layout, cache))

    def _branches(
        self,
        q: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        layout: Layout,
        cache: SparseCache | None = None,
    ) -> tuple[Tensor, ...]:
        """What each branch sees (B, T, H, w), of `_projected`."""
        turned, turned_keys = self._turned(q, keys, layout)
        asks, summed = (turned, turned_keys[0]) if self.cfg.compress_rope else (q, keys[0])
        compressed, starts = self._compressed(asks, summed, values[0], layout, cache)
        selected = self._selected(turned, turned_keys[1], values[1], starts, cache)
        window = self._window(turned, turned_keys[2], values[2], layout, cache)
        return compressed, selected, window

    def _joined(self, x: Tensor, branches: tuple[Tensor, ...]) -> Tensor:
        """(B, T, D)"""
        gates = self.g_proj(x)  # (B, T, H, 3)
        o = sum(g[..., None] * branch for g, branch in zip(gates.unbind(-1), branches, strict=True))
        assert isinstance(o, Tensor)
        return self.o_proj(o.flatten(2))

    def _projected(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """q (B, T, H, h); of each branch k (B, T, G, h) and v (B, T, G, w)."""
        c = self.cfg
        q = self.q_proj(x).unflatten(-1, (c.n_heads, c.head_dim))
        k = self.k_proj(x).unflatten(-1, (c.projections, c.n_kv_heads, c.head_dim)).unbind(2)
        v = self.v_proj(x).unflatten(-1, (c.projections, c.n_kv_heads, c.value_dim)).unbind(2)
        return q, self._by_branch(k), self._by_branch(v)

    def _by_branch(self, projected: tuple[Tensor, ...]) -> list[Tensor]:
        return [*projected] * 3 if self.cfg.share_branch_kv else [*projected]

    def _turned(self, q: Tensor, keys: list[Tensor], layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """Queries and keys at their positions; those of the compressed branch as they are, unless it turns too."""
        first = 0 if self.cfg.compress_rope else 1
        together = keys[:1] if self.cfg.share_branch_kv else keys[first:]
        q, turned = qk_norm_rope(q, torch.cat(together, 2), *layout.rotation, self.kernels)
        parts = [*turned.chunk(len(together), 2)]
        if self.cfg.share_branch_kv:
            return q, parts * 3
        return q, [*keys[:first], *parts]

    def _compressed(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, cache: SparseCache | None
    ) -> tuple[Tensor, Tensor]:
        """o (B, T, H, w), 0 where no summary is seen; and the selected blocks (B, T, G, n)."""
        c = self.cfg
        if cache is not None:
            k, v = (t[:, layout.skip :] for t in _appended(cache["unsummed"], self.layer, k, v))
        keys = self.compress_k(k, layout.new_begin, layout.new)  # (B, N', G, h)
        values = self.compress_v(v, layout.new_begin, layout.new)
        if cache is not None:
            keys, values = _appended(cache["summaries"], self.layer, keys, values)
        starts = self.ranking(q, keys, layout)
        if layout.summaries is None:
            # What makes summaries has a gradient all the same, of 0: rows of few chunks are steps like others.
            nothing = (keys.sum() + values.sum()).to(q.dtype)
            return nothing.expand(*q.shape[:3], c.value_dim), starts
        o = self._attend(q, keys, values, layout.summaries)
        return o.masked_fill(layout.lonely[..., None, None], 0.0), starts

    def _selected(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, cache: SparseCache | None) -> Tensor:
        if cache is not None:
            k, v = _appended(cache["selected"], self.layer, k, v)
        return selected_attention(q, k, v, starts, block=self.cfg.selection_block_size, kernels=self.kernels)

    def _window(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, cache: SparseCache | None) -> Tensor:
        if cache is not None:
            k, v = _appended(cache["window"], self.layer, k, v)
        return self._attend(q, k, v, layout.window)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """Keys and values as wide as each other, as libraries want them: zeros change nothing."""
        wide = max(self.cfg.head_dim, self.cfg.value_dim)
        q, k, v = (F.pad(t, (0, wide - t.shape[3])) if t.shape[3] < wide else t for t in (q, k, v))
        o = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), plan)
        return o.transpose(1, 2)[..., : self.cfg.value_dim]

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        c = self.cfg
        return {
            "qk_norm_rope": rotation_call(c.head_dim, interleaved=False),
            "selected_attention": selected_call(
                seq_len, c.num_selected_blocks * c.selection_block_size, c.head_dim, c.value_dim
            ),
        }


def _appended(cache: Any, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k (B, T, G, h), v (B, T, G, w) stored -> what is to be seen, (B, S, G, h) and (B, S, G, w)."""
    widths = k.shape[3], v.shape[3]
    # A cache holds keys and values of one width: the narrower ones with zeros behind them.
    k, v = (F.pad(t, (0, max(widths) - t.shape[3])) if t.shape[3] < max(widths) else t for t in (k, v))
    k, v = cache.append(layer, k.transpose(1, 2), v.transpose(1, 2))
    return k.transpose(1, 2)[..., : widths[0]], v.transpose(1, 2)[..., : widths[1]]
