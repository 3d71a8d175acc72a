"""Operations of native sparse attention, per token (Yuan et al. 2025, section 3), of rows that are one document."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from models.layers.flops import Flops, decoder_flops, matmul_flops
from models.sparse.config import BRANCHES, NSAConfig

__all__ = ["sparse_attention_flops"]


def sparse_attention_flops(cfg: NSAConfig, length: Any) -> Flops:
    """Of one layer, where a row has `length` tokens: a number, or a tensor of them. Summaries are seen from their last
    token on; to rank blocks, their scores are made again, which passes no gradient on."""
    groups, key, value = cfg.n_kv_heads, cfg.head_dim, cfg.value_dim
    weights = cfg.d_model * (cfg.n_heads + cfg.projections * groups) * (key + value) + _gate_weights(cfg)
    summaries = _blocks(cfg, length)
    first = length - cfg.compress_block_size + 1  # tokens that see the first summary
    seen = (summaries * first - cfg.stride * summaries * (summaries - 1) / 2) / length
    keys = [seen, _selected_keys(cfg, length), _window_keys(cfg.sliding_window, length)]
    attended = decoder_flops(weights, keys, cfg.n_heads * (key + value) / 2, [summaries, length, length])
    scores = 2.0 * cfg.n_heads * key * summaries
    return attended + Flops(scores, scores) + _summary_flops(cfg, length, summaries)


def _gate_weights(cfg: NSAConfig) -> int:
    width = cfg.gate_hidden_dim or cfg.d_model
    return width * BRANCHES * cfg.n_heads + cfg.d_model * cfg.gate_hidden_dim


def _blocks(cfg: NSAConfig, length: Any) -> Any:
    """Whole blocks that are summed up."""
    return _at_least_0((length - cfg.compress_block_size) // cfg.stride + 1)


def _selected_keys(cfg: NSAConfig, length: Any) -> Any:
    """Tokens of a document's selected blocks, mean over a row that is one: all before a token's own block at first."""
    block, others = cfg.selection_block_size, cfg.num_selected_blocks - 1
    dense = length - _at_least_0(length - block * cfg.num_selected_blocks)  # tokens that select every block
    blocks, rest = (length - dense) // block, (length - dense) % block
    own = blocks * block * (block + 1) / 2 + rest * (rest + 1) / 2
    return (dense * (dense + 1) / 2 + (length - dense) * others * block + own) / length


def _window_keys(window: int, length: Any) -> Any:
    short = length - _at_least_0(length - window)
    return (short * (short + 1) / 2 + (length - short) * window) / length


def _summary_flops(cfg: NSAConfig, length: Any, summaries: Any) -> Flops:
    """Of the MLPs that sum up blocks: each token is in the products of as many as overlap there."""
    if cfg.compression == "mean":
        return Flops(0.0, 0.0)
    total: Any = 0.0
    for width in (cfg.head_dim, cfg.value_dim):
        hidden = cfg.compress_mlp_ratio * width
        up = cfg.compress_block_size * width * hidden * (length // cfg.stride)
        total = total + cfg.n_kv_heads * (up + hidden * width * summaries) / length
    return matmul_flops(total)


def _at_least_0(x: Any) -> Any:
    return x.clamp(min=0) if isinstance(x, Tensor) else max(0, x)
