"""A bank of learned tokens: a matrix, or a product of two thin ones; rounded to few bits where the run says so.

Shapes: N tokens of width m, rank r.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.layers.init import normal_
from models.memory.quant import rounded

if TYPE_CHECKING:
    from models.memory.config import MemoryConfig

__all__ = ["Bank", "FactorizedBank", "bits_of", "new_bank"]


class Bank(nn.Module):
    """M (N, m)."""

    def __init__(self, cfg: MemoryConfig) -> None:
        super().__init__()
        self.std, self.bits = cfg.memory_init_std, cfg.memory_quant_bits if cfg.quantize_memory else None
        self.weight = nn.Parameter(torch.empty(cfg.num_memory_tokens, cfg.token_width))

    def tokens(self) -> Tensor:
        """(N, m), as every forward pass reads them."""
        return self.read(self.weight)

    def read(self, rows: Tensor) -> Tensor:
        return rows if self.bits is None else rounded(rows, self.bits)

    def init_weights(self, generator: torch.Generator) -> None:
        normal_(self.weight, self.std, generator)


class FactorizedBank(Bank):
    """M = A B^T, A (N, r), B (m, r): each rounded by itself. Entries of M begin with the std of the bank."""

    def __init__(self, cfg: MemoryConfig) -> None:
        super().__init__(cfg)
        self.weight = nn.Parameter(torch.empty(cfg.num_memory_tokens, cfg.memory_rank))
        self.basis = nn.Parameter(torch.empty(cfg.token_width, cfg.memory_rank))

    def tokens(self) -> Tensor:
        return self.read(self.weight) @ self.read(self.basis).mT

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        normal_(self.basis, self.basis.shape[1] ** -0.5, generator)


def bits_of(model: nn.Module) -> dict[str, int]:
    """Parameters of a model that are kept in few bits where no training goes on -> in how many."""
    banks = [(path, module) for path, module in model.named_modules() if isinstance(module, Bank)]
    return {
        f"{path}.{name}": bank.bits
        for path, bank in banks
        if bank.bits is not None
        for name, _ in bank.named_parameters()
    }


def new_bank(cfg: MemoryConfig) -> Bank:
    return (FactorizedBank if cfg.factorized else Bank)(cfg)
