"""What a model has some of whose blocks read a memory, be they our own or those of a pretrained base.

Shapes: B rows, T tokens, N memory tokens of width m.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from kernels.attention import Visible, attention_call, plan_attention
from kernels.choose import UsesKernels
from kernels.precision import compute_dtype
from models.layers.decoder import document_positions
from models.layers.flops import Flops, decoder_flops, matmul_flops
from models.memory.bank import Bank
from models.memory.block import MemoryLayer, Reading
from models.memory.config import MemoryConfig
from models.memory.router import Pooling

__all__ = ["ReadsMemory"]


class ReadsMemory(UsesKernels):
    """A subclass sets `banks`, and defines `memory_cfg` and `memories`."""

    banks: nn.ModuleList

    @property
    def memory_cfg(self) -> MemoryConfig:
        raise NotImplementedError(f"{type(self).__name__} must define memory_cfg")

    @property
    def memories(self) -> list[MemoryLayer]:
        """Of the blocks that read it, in their order."""
        raise NotImplementedError(f"{type(self).__name__} must define memories")

    @property
    def every_bank(self) -> list[Bank]:
        return [bank for bank in self.banks if isinstance(bank, Bank)]

    def reading(
        self,
        tokens: Tensor,
        past: int,
        doc_ids: Tensor | None,
        valid: Tensor | None,
        openings: Tensor | None = None,
    ) -> Reading:
        """What blocks are told of the memory in a pass over tokens (B, T), which `past` others of a cache precede.
        `valid` and `openings` as `Pooling` has them."""
        c = self.memory_cfg
        # Here, as what blocks share is converted once: autocast would do it in the first block alone, and again in
        # every one whose activations are recomputed.
        banks = tuple(bank.tokens().to(compute_dtype(bank.weight)) for bank in self.every_bank)
        if not banks:
            return Reading(banks, None, None)
        if c.use_chapters:
            first = None
            if doc_ids is not None:
                index = torch.arange(tokens.shape[1], device=tokens.device)
                first = index - document_positions(doc_ids)
            strategy = c.routing_strategy_train if self.training else c.routing_strategy_inference
            pooling = Pooling(strategy, c.routing_window_size, c.looks_ahead, first, valid, past, openings)
            return Reading(banks, None, pooling)
        visible = Visible(1, tokens.numel(), c.num_memory_tokens, tokens.device, causal=False)
        plan = plan_attention(
            visible,
            dtype=banks[0].dtype,
            heads=c.memory_heads,
            width=c.memory_head_width,
            kernels=self.kernels,
            dropout=c.dropout if self.training else 0.0,
        )
        return Reading(banks, plan, None)

    def memory_attention_call(self, seq_len: int) -> dict[str, Any]:
        """What the rule of choice may know of attention to all of the memory, from rows of so many tokens."""
        c, nowhere = self.memory_cfg, torch.device("meta")
        facts = Visible(1, seq_len, c.num_memory_tokens, nowhere, causal=False).facts
        return attention_call(facts, c.memory_heads, c.memory_head_width, dropout=c.dropout)

    def init_memory(self, generator: torch.Generator) -> None:
        """From a generator of its own, of the seed + 1, so that all else is as without a memory."""
        own = torch.Generator().manual_seed(generator.initial_seed() + 1)
        for bank in self.every_bank:
            bank.init_weights(own)
        for layer in self.memories:
            layer.init_weights(own)

    @property
    def non_causal_routing(self) -> bool:
        c = self.memory_cfg
        return c.looks_ahead and "sequence" in (c.routing_strategy_train, c.routing_strategy_inference)

    @property
    def sees_all(self) -> bool:
        """Whether decisions in scores and text are by the whole text: every token changes those of all."""
        return self.memory_cfg.looks_ahead and self.memory_cfg.routing_strategy_inference == "sequence"

    # -- operations ------------------------------------------------------------------------------------------------

    def memory_flops(self, layer: MemoryLayer) -> Flops:
        """Of one layer per token, without what is made of the bank."""
        c, attn = self.memory_cfg, layer.attn
        weights = sum(p.numel() for part in (attn.q_proj, attn.o_proj) for p in part.parameters())
        if layer.router is not None:
            weights += layer.router.weight.numel()
        if layer.mlp is not None:
            weights += sum(p.numel() for p in layer.mlp.parameters() if p.ndim == 2)
        keys = c.keys_per_token
        return decoder_flops(weights, [keys], c.attention_width, [keys])

    def bank_flops(self) -> Flops:
        """Of a step, however many tokens it has: keys and values, and the product of a factorized bank."""
        c = self.memory_cfg
        per_token = sum(
            p.numel()
            for m in self.memories
            for part in (m.attn.k_proj, m.attn.v_proj)
            for p in part.parameters()
        )
        if c.factorized:
            per_token += len(self.banks) * c.token_width * c.memory_rank
        return matmul_flops(c.num_memory_tokens * per_token)

    def passes(self, path: str) -> float:
        """Keys and values are of the bank: no token passes what makes them."""
        return 0.0 if re.fullmatch(r"(.*\.memory|memory_layers\.\d+)\.attn\.[kv]_proj.*", path) else 1.0

    def active_parameters(self) -> int | None:
        """Of banks of which a token reads chapters, that share of their tokens; None where it reads all."""
        if not self.memory_cfg.routed:
            return None
        total = sum(p.numel() for p in self.parameters())
        unread = self.memory_cfg.num_memory_tokens - self.memory_cfg.keys_per_token
        return total - sum(unread * bank.weight.shape[1] for bank in self.every_bank)
