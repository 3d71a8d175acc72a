"""The control's block with a memory: between attention and feed-forward layer (A), or behind these, with a second
feed-forward layer of its own (B).

Shapes: B rows, T tokens, D width, N memory tokens of width m, C chapters to choose from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.init import normal_
from models.layers.norms import LayerNorm, RMSNorm
from models.memory.attention import MemoryAttention, init_projection
from models.memory.router import Choice, MemoryCache, Pooling, Router
from models.vanilla import MLP, Block, Rotation

if TYPE_CHECKING:
    from kernels.attention import Plan
    from models.memory.config import MemoryConfig

__all__ = ["LOSSES", "MemoryBlock", "MemoryLayer", "Reading"]

# Losses of routers -> the switch and the field of its weight.
LOSSES = {
    "load_balance": ("use_load_balance_loss", "load_balance_coefficient"),
    "aux": ("use_auxiliary_loss", "auxiliary_loss_coefficient"),
    "z": ("use_z_loss", "z_loss_coefficient"),
}


@dataclass(frozen=True, eq=False)
class Reading:
    """What blocks are told of a pass: the tokens of each bank, (N, m), and how all of them are attended to, or how
    chapters of them are decided on."""

    banks: tuple[Tensor, ...]
    plan: Plan | None
    pooling: Pooling | None


class MemoryLayer(nn.Module):
    def __init__(self, cfg: MemoryConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout, self.bank = layer, cfg.dropout, cfg.bank_of[layer]
        self.wo_init_zero, self.init_std = cfg.wo_init_zero, cfg.initializer_range
        self.norm = cfg.norm(cfg.d_model)
        self.attn = MemoryAttention(cfg)
        self.router = Router(cfg) if cfg.use_chapters else None
        of_variant_b = cfg.memory_block_variant == "B"
        self.mlp_norm = cfg.norm(cfg.d_model) if of_variant_b else None
        self.mlp = MLP(cfg) if of_variant_b else None

    def forward(
        self, x: Tensor, reading: Reading, cache: MemoryCache | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, T, D), normalised -> what is added to the stream, and what a router tells: see `_told`."""
        bank = reading.banks[self.bank]
        if self.router is None:
            return self._dropped(self.attn(x, bank, reading.plan, None)), {}
        assert reading.pooling is not None
        z, decided = reading.pooling(x, self.layer, cache)
        choice = self.router(z)
        chosen = choice.chapters[..., self.router.shared :] - self.router.shared  # (B, T, K)
        y = self._dropped(self.attn(x, bank, None, choice))
        return y, self._told(choice, chosen, decided)

    def _dropped(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training)

    def _told(self, choice: Choice, chosen: Tensor, decided: Tensor) -> dict[str, Tensor]:
        """`chosen` (B, T, K) int64, `decided` (B, T) and `load` (C,) int64, decisions for each chapter. In training
        also sums over decisions, of which losses are made: of probabilities, `importance` (C,), of squared normalisers
        and of entropies."""
        logits, shares = choice.logits, choice.shares
        with torch.no_grad():
            takes = decided[..., None].expand(chosen.shape).long().flatten()
            load = takes.new_zeros(logits.shape[-1]).scatter_add(0, chosen.flatten(), takes)
        told = {"chosen": chosen, "decided": decided, "load": load}
        if not self.training:
            return told
        made = decided.to(logits.dtype)  # (B, T)
        # Of the size (B, T, C) backward keeps what the router made, and nothing more.
        normaliser = logits.logsumexp(-1)  # (B, T)
        told["importance"] = (shares * made[..., None]).sum((0, 1))
        told["squares"] = (normaliser**2 * made).sum()
        with torch.no_grad():
            told["entropy"] = ((normaliser - (shares * logits).sum(-1)) * made).sum()
        return told

    def init_weights(self, generator: torch.Generator) -> None:
        """N(0, initializer_range^2), or 0 of what writes to the stream; gains 1, biases 0."""
        draw = partial(normal_, generator=generator)
        ends = [self.attn.o_proj]
        for projection in (self.attn.q_proj, self.attn.k_proj, self.attn.v_proj):
            init_projection(projection, self.init_std, draw)
        if self.router is not None:
            self.router.init_weights(generator)
        if self.mlp is not None:
            ends.append(self.mlp.down_proj)
            for part in (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj):
                if part is not None and part is not self.mlp.down_proj:
                    draw(part.weight, self.init_std)
                if part is not None and part.bias is not None:
                    nn.init.zeros_(part.bias)
        for end in ends:
            if self.wo_init_zero:
                nn.init.zeros_(end.weight)
            else:
                draw(end.weight, self.init_std)
        for norm in (self.norm, self.mlp_norm):
            if isinstance(norm, RMSNorm | LayerNorm):
                norm.init_weights()


class MemoryBlock(Block):
    def __init__(self, cfg: MemoryConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        self.memory = MemoryLayer(cfg, layer)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        plan: Plan,
        rotation: Rotation | None,
        reading: Reading,
        cache: MemoryCache | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        memory = self.memory
        branch = self.self_attn(self.input_layernorm(x), plan, rotation, cache)
        if memory.mlp is None or memory.mlp_norm is None:
            x, y = memory.norm(x, branch)
            added, told = memory(y, reading, cache)
            x, y = self.post_attention_layernorm(x, added)
            return x + self.mlp(y), told
        x, y = self.post_attention_layernorm(x, branch)
        x, y = memory.norm(x, self.mlp(y))
        added, told = memory(y, reading, cache)
        x, y = memory.mlp_norm(x, added)
        return x + memory.mlp(y), told
