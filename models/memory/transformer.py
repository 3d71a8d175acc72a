"""The control's decoder, whose blocks also attend to a bank of learned tokens.

Related: persistent vectors in attention (Sukhbaatar et al. 2019, arXiv:1907.01470), product keys (Lample et al. 2019,
1907.05242), memory layers at scale (Berges et al. 2024, 2412.09764). The backbone is drawn before the memory, from the
run's generator: with `vanilla_mode`, or no block that reads, it is the same model bit for bit, and with zeros where the
memory writes to the stream it computes the same at first.

Shapes: B rows, T tokens, D width, N memory tokens of width m.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.cache import KVCache
from models.layers.flops import Flops
from models.layers.roles import Rule
from models.memory.bank import new_bank
from models.memory.block import MemoryBlock, MemoryLayer
from models.memory.config import MemoryConfig
from models.memory.reader import ReadsMemory
from models.memory.router import MemoryCache
from models.vanilla import PlainBlock, Vanilla

__all__ = ["MemoryTransformer"]


class MemoryTransformer(ReadsMemory, Vanilla):
    """`forward` takes `valid` (B, T) bool besides, which tokens are text, where chapters are decided by all of it, and
    `openings` (B, T) or (B, 1) int64, how many tokens are given at the beginning of each document: see `Pooling`."""

    Config = MemoryConfig
    cfg: MemoryConfig

    def __init__(self, cfg: MemoryConfig) -> None:
        super().__init__(cfg)
        self.banks = nn.ModuleList(new_bank(cfg) for _ in {*cfg.bank_of.values()})

    def shared(
        self,
        tokens: Tensor,
        past: int,
        doc_ids: Tensor | None,
        cu_seqlens: Tensor | None = None,
        valid: Tensor | None = None,
        openings: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The plan of attention, the rotation, and what blocks are told of the memory."""
        plan, rotation = super().shared(tokens, past, doc_ids, cu_seqlens)
        return plan, rotation, self.reading(tokens, past, doc_ids, valid, openings)

    @property
    def attention_dropout(self) -> float:
        c = self.cfg
        return c.dropout if c.attention_dropout is None else c.attention_dropout

    def new_block(self, layer: int) -> nn.Module:
        return (MemoryBlock if layer in self.cfg.bank_of else PlainBlock)(self.cfg, layer)

    @property
    def init_std(self) -> float:
        return self.cfg.initializer_range

    def init_weights(self, generator: torch.Generator) -> None:
        """The backbone first, as the control's, then the memory."""
        super().init_weights(generator)
        self.init_memory(generator)

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """As the control's; parts of a memory are left to `init_weights`."""
        memory = {
            id(m) for layer in part.modules() if isinstance(layer, MemoryLayer) for m in layer.modules()
        }
        for name, module in part.named_modules():
            if id(module) not in memory:
                self.init_module(name, module, generator)

    @property
    def memory_cfg(self) -> MemoryConfig:
        return self.cfg

    @property
    def memories(self) -> list[MemoryLayer]:
        return [block.memory for block in self.layers if isinstance(block, MemoryBlock)]

    # -- text ------------------------------------------------------------------------------------------------------

    def init_cache(self, rows: int) -> KVCache | None:  # type: ignore[override]
        """None where decisions see the whole text: every token changes those of all."""
        return None if self.sees_all else MemoryCache(self.cfg.n_layers, rows)

    # -- parameters ------------------------------------------------------------------------------------------------

    def added(self, name: str) -> bool:
        return ".memory." in name or name.startswith("banks.")

    def param_roles(self) -> list[Rule]:
        return [
            Rule(r"banks\..*", "memory_bank"),
            Rule(r"layers\.\d+\.memory\..*", "memory"),
            *super().param_roles(),
        ]

    def hf_views(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        if self.banks:
            raise ValueError(f"type=memory: {self.hf.name} has no memory")
        return super().hf_views()

    def flops(self, seq_len: int) -> Flops:
        """Of one token; what is made of the bank is once for all tokens of a step, and only in what a step really took
        (`bank_flops`)."""
        return sum((self.memory_flops(layer) for layer in self.memories), super().flops(seq_len))
