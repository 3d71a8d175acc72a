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

from kernels.attention import Visible, plan_attention
from kernels.precision import compute_dtype
from models.layers.cache import KVCache
from models.layers.decoder import document_positions
from models.layers.flops import Flops, decoder_flops, matmul_flops
from models.layers.roles import Rule
from models.memory.bank import Bank, new_bank
from models.memory.block import MemoryBlock, MemoryLayer, Reading
from models.memory.config import MemoryConfig
from models.memory.router import MemoryCache, Pooling
from models.vanilla import PlainBlock, Vanilla

__all__ = ["MemoryTransformer"]


class MemoryTransformer(Vanilla):
    """`forward` takes `valid` (B, T) bool besides, which tokens are text, where chapters are decided by all of it."""

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
    ) -> tuple[Any, ...]:
        """The plan of attention, the rotation, and what blocks are told of the memory."""
        plan, rotation = super().shared(tokens, past, doc_ids, cu_seqlens)
        # Here, as what blocks share is converted once: autocast would do it in the first block alone, and again in
        # every one whose activations are recomputed.
        banks = tuple(bank.tokens().to(compute_dtype(bank.weight)) for bank in self.every_bank)
        return plan, rotation, self._reading(tokens, past, doc_ids, banks, valid)

    def _reading(
        self,
        tokens: Tensor,
        past: int,
        doc_ids: Tensor | None,
        banks: tuple[Tensor, ...],
        valid: Tensor | None,
    ) -> Reading:
        c = self.cfg
        if not banks:
            return Reading(banks, None, None)
        if c.use_chapters:
            first = None
            if doc_ids is not None:
                index = torch.arange(tokens.shape[1], device=tokens.device)
                first = index - document_positions(doc_ids)
            strategy = c.routing_strategy_train if self.training else c.routing_strategy_inference
            pooling = Pooling(strategy, c.routing_window_size, c.looks_ahead, first, valid, past)
            return Reading(banks, None, pooling)
        visible = Visible(1, tokens.numel(), c.num_memory_tokens, tokens.device, causal=False)
        plan = plan_attention(
            visible,
            dtype=compute_dtype(self.embedding_weight),
            heads=c.memory_heads,
            width=c.memory_head_width,
            kernels=self.kernels,
            dropout=c.dropout if self.training else 0.0,
        )
        return Reading(banks, plan, None)

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
        """The backbone first, as the control's; the memory from a generator of its own, of the seed + 1."""
        super().init_weights(generator)
        own = torch.Generator().manual_seed(generator.initial_seed() + 1)
        for bank in self.every_bank:
            bank.init_weights(own)
        for layer in self.memories:
            layer.init_weights(own)

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """As the control's; parts of a memory are left to `init_weights`."""
        memory = {
            id(m) for layer in part.modules() if isinstance(layer, MemoryLayer) for m in layer.modules()
        }
        for name, module in part.named_modules():
            if id(module) not in memory:
                self.init_module(name, module, generator)

    @property
    def every_bank(self) -> list[Bank]:
        return [bank for bank in self.banks if isinstance(bank, Bank)]

    @property
    def memories(self) -> list[MemoryLayer]:
        return [block.memory for block in self.layers if isinstance(block, MemoryBlock)]

    # -- text ------------------------------------------------------------------------------------------------------

    def init_cache(self, rows: int) -> KVCache | None:  # type: ignore[override]
        """None where decisions see the whole text: every token changes those of all."""
        if self.cfg.looks_ahead and self.cfg.routing_strategy_inference == "sequence":
            return None
        return MemoryCache(self.cfg.n_layers, rows)

    @property
    def non_causal_routing(self) -> bool:
        return self.cfg.looks_ahead and "sequence" in (
            self.cfg.routing_strategy_train,
            self.cfg.routing_strategy_inference,
        )

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

    def memory_flops(self, layer: MemoryLayer) -> Flops:
        """Of one layer per token, without what is made of the bank."""
        c, attn = self.cfg, layer.attn
        weights = sum(p.numel() for part in (attn.q_proj, attn.o_proj) for p in part.parameters())
        if layer.router is not None:
            weights += layer.router.weight.numel()
        if layer.mlp is not None:
            weights += sum(p.numel() for p in layer.mlp.parameters() if p.ndim == 2)
        keys = c.keys_per_token
        return decoder_flops(weights, [keys], c.attention_width, [keys])

    def bank_flops(self) -> Flops:
        """Of a step, however many tokens it has: keys and values, and the product of a factorized bank."""
        c = self.cfg
        per_token = sum(
            p.numel()
            for m in self.memories
            for part in (m.attn.k_proj, m.attn.v_proj)
            for p in part.parameters()
        )
        if c.factorized:
            per_token += len(self.banks) * c.token_width * c.memory_rank
        return matmul_flops(c.num_memory_tokens * per_token)

    def flops(self, seq_len: int) -> Flops:
        """Of one token; what is made of the bank is once for all tokens of a step, and only in what a step really took
        (`bank_flops`)."""
        return sum((self.memory_flops(layer) for layer in self.memories), super().flops(seq_len))

    def passes(self, path: str) -> float:
        """Keys and values are of the bank: no token passes what makes them."""
        return 0.0 if ".memory.attn.k_proj" in path or ".memory.attn.v_proj" in path else 1.0

    def active_parameters(self) -> int | None:
        """Of banks of which a token reads chapters, that share of their tokens; None where it reads all."""
        if not self.cfg.routed:
            return None
        total = sum(p.numel() for p in self.parameters())
        unread = self.cfg.num_memory_tokens - self.cfg.keys_per_token
        return total - sum(unread * bank.weight.shape[1] for bank in self.every_bank)
