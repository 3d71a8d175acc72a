"""A base that was made elsewhere and stays as it is, a small trained adapter and a head on top of it.

The base's file stands for one of weights: they are drawn from a generator that its digest seeds.

Shapes: B rows, T tokens, D width, r rank.
"""

import hashlib
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Free, Positive
from models.layers.cache import KVCache
from models.layers.decoder import Decoder
from models.layers.flops import Flops, matmul_flops
from models.layers.init import INIT_STD, normal_
from models.layers.roles import Rule
from models.vanilla import Vanilla, VanillaConfig, block_flops


class Config(VanillaConfig):
    base: Free[str] = "base.txt"  # where the base lies; it may move, what it holds may not change
    rank: Positive = 16

    examples: ClassVar = {"base": "__init__.py"}  # any file is some base

    @property
    def digest(self) -> str:
        return hashlib.sha256((Path(__file__).parent / self.base).read_bytes()).hexdigest()


class Adapter(nn.Module):
    """x + up(gelu(down(x))); starts as the identity."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


class FrozenBase(Decoder):
    Config = Config
    lora_targets = ("adapter.down", "adapter.up")  # nothing goes back into the base

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.base = Vanilla(cfg)
        self.adapter = Adapter(cfg.d_model, cfg.rank)
        self.lm_head = nn.Linear(cfg.d_model, len(self.base.head_weight), bias=False)

    def forward(self, tokens: Tensor, doc_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        with torch.no_grad():
            x = self.base(tokens, doc_ids, cache)  # (B, T, D)
        return self.adapter(x)

    def external(self) -> list[str]:
        return ["base"]

    def provenance(self) -> dict[str, str]:
        return {"base": self.cfg.digest}

    def init_weights(self, generator: torch.Generator) -> None:
        self.base.init_weights(torch.Generator().manual_seed(int(self.cfg.digest[:15], 16)))
        normal_(self.adapter.down.weight, self.cfg.d_model**-0.5, generator)
        nn.init.zeros_(self.adapter.up.weight)
        normal_(self.lm_head.weight, INIT_STD, generator)

    def blocks(self) -> list[str]:
        return [*(f"base.{block}" for block in self.base.blocks()), "adapter"]

    def param_roles(self) -> list[Rule]:
        return [
            Rule(r"lm_head\.weight", "head"),
            Rule(r"adapter\.down\.weight", "matrix"),  # reads the width, so that its rate follows it
            Rule(r"adapter\.up\.weight", "adapter"),
            Rule(r"base\..*(embed_tokens|positions)\.weight", "embedding"),
            Rule(r"base\..*norm\.weight|.*\.bias", "scalar"),
            Rule(r"base\..*", "matrix"),
        ]

    def flops(self, seq_len: int) -> Flops:
        """Nothing is propagated back through the base, and its head is not used."""
        base = block_flops(self.cfg, seq_len) * self.cfg.n_layers
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return base.frozen + matmul_flops(trained)
