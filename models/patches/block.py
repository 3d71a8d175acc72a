"""Blocks of both stacks: pre-norm attention and MLP, without biases in products.

Shapes: B rows, K patches, N bytes of a patch, D width, H heads, h = D/H head width, r bytes of the patch before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Plan, attention
from kernels.choose import UsesKernels
from kernels.patch_attention import PatchPlan, patch_attention
from kernels.qk_norm_rope import qk_norm_rope, rotation_call
from models.layers.cache import KVCache, StateCache
from models.layers.norms import LayerNorm
from models.patches.config import MegabyteConfig

__all__ = ["GlobalBlock", "LocalBlock", "Neighbours", "norm"]

NORM_EPS = 1e-5


def norm(width: int) -> LayerNorm:
    return LayerNorm(width, NORM_EPS, bias=True)


class _Attention(UsesKernels):
    def __init__(self, width: int, heads: int, dropout: float, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout, self.head_width = layer, dropout, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> three (..., H, h)."""
        per_head = (-1, self.head_width)
        return tuple(f(x).unflatten(-1, per_head) for f in (self.q_proj, self.k_proj, self.v_proj))  # type: ignore

    def _out(self, y: Tensor) -> Tensor:
        """(..., H, h) -> (..., D)."""
        return F.dropout(self.o_proj(y.flatten(-2)), self.dropout, self.training)


class GlobalAttention(_Attention):
    """Of patches, to those before them. Where they stand is in their bytes' embeddings."""

    def forward(self, x: Tensor, plan: Plan, cache: KVCache | None = None) -> Tensor:
        """x (B, K, D)."""
        q, k, v = (t.transpose(1, 2) for t in self._heads(x))  # (B, H, K, h)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self._out(attention(q, k, v, plan).transpose(1, 2))


class Neighbours(NamedTuple):
    """What local layers share: whom a byte sees, and its rotation. With a cache, r, and `keep`: bytes of the last patch
    that stand for text."""

    plan: PatchPlan | Plan  # the second with a cache
    rotation: tuple[Tensor, Tensor]  # each (K N, 1, h/2)
    reach: int = 0
    keep: int = 0


class LocalAttention(_Attention):
    """Of bytes, to those before them in their patch, and to the last r places of the patch before (section 2.3.2)."""

    def forward(self, x: Tensor, shared: Neighbours, cache: StateCache | None = None) -> Tensor:
        """x (B, K, N, D). With a cache, the first patch goes on with what that holds."""
        patches, length = x.shape[1:3]
        q, k, v = (t.flatten(1, 2) for t in self._heads(x))  # (B, K N, H, h)
        # Positions run on from patch to patch: those of the one before are r to 1 in front of this one's.
        q, k = qk_norm_rope(q, k, *shared.rotation, self.kernels)
        if isinstance(shared.plan, PatchPlan):
            return self._out(patch_attention(q, k, v, shared.plan)).unflatten(1, (patches, length))
        q, k, v = (t.unflatten(1, (patches, length)) for t in (q, k, v))
        assert cache is not None, "patches that are not whole go on behind a cache"
        before = cache[f"local_{self.layer}"]  # (B, 2, m, H, h)
        both = _behind(torch.stack((k, v), 1), before, shared.reach)  # (B, 2, K, m + N, H, h)
        cache[f"local_{self.layer}"] = both[:, :, -1, : both.shape[3] - length + shared.keep]
        k, v = both.unbind(1)
        q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))  # (B K, H, N or m + N, h)
        y = attention(q, k, v, shared.plan).transpose(1, 2)
        return self._out(y.unflatten(0, (-1, patches)))

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"qk_norm_rope": rotation_call(self.head_width, interleaved=False)}


def _behind(own: Tensor, before: Tensor, reach: int) -> Tensor:
    """own (B, 2, K, N, H, h), each patch behind the last r of the one before: (B, 2, K, m + N, H, h). The first patch
    of a row is behind `before` (B, 2, m, H, h), m = r unless K = 1; where there is nothing, behind zeros, which the
    plan hides."""
    if not before.shape[2]:
        if not reach:
            return own
        before = own.new_zeros(*own.shape[:2], reach, *own.shape[4:])
    first = before[:, :, None]
    if own.shape[2] > 1:
        first = torch.cat((first, own[:, :, :-1, own.shape[3] - reach :]), 2)
    return torch.cat((first, own), 3)


class MLP(nn.Module):
    """down( relu(up x) ), or SwiGLU: down( silu(gate x) * up x )."""

    def __init__(self, cfg: MegabyteConfig, width: int) -> None:
        super().__init__()
        self.dropout, hidden = cfg.dropout, cfg.hidden_width(width)
        self.gate_proj = nn.Linear(width, hidden, bias=False) if cfg.mlp_type == "swiglu" else None
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        y = F.relu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        return F.dropout(self.down_proj(y), self.dropout, self.training)


class _Block(nn.Module):
    def __init__(self, cfg: MegabyteConfig, attention: _Attention, width: int) -> None:
        super().__init__()
        self.attention_norm = norm(width)
        self.attention = attention
        self.mlp_norm = norm(width)
        self.mlp = MLP(cfg, width)

    def run(self, x: Tensor, shared: Any, cache: Any) -> Tensor:
        x, y = self.mlp_norm(x, self.attention(self.attention_norm(x), shared, cache))
        return x + self.mlp(y)


# Each has a forward of its own: the compiler takes the widths of two stacks behind one for a size that varies.
class GlobalBlock(_Block):
    def __init__(self, cfg: MegabyteConfig, layer: int) -> None:
        super().__init__(
            cfg, GlobalAttention(cfg.d_global, cfg.global_n_heads, cfg.dropout, layer), cfg.d_global
        )

    def forward(self, x: Tensor, plan: Plan, cache: KVCache | None = None) -> Tensor:
        """x (B, K, D), the residual stream."""
        return self.run(x, plan, cache)


class LocalBlock(_Block):
    def __init__(self, cfg: MegabyteConfig, layer: int) -> None:
        super().__init__(cfg, LocalAttention(cfg.d_local, cfg.local_n_heads, cfg.dropout, layer), cfg.d_local)

    def forward(self, x: Tensor, shared: Neighbours, cache: StateCache | None = None) -> Tensor:
        """x (B, K, N, D), the residual stream."""
        return self.run(x, shared, cache)
