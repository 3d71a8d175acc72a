"""A decoder with a memory behind its last norm: roles that have rates of their own; see test_rates.py."""

from __future__ import annotations

import torch
from torch import nn

from adapters.default import DefaultModelAdapter
from models.layers.flops import matmul_flops
from models.layers.roles import Rule
from models.vanilla import Vanilla

ROWS = 8  # of the bank


class Recalling(Vanilla):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.memory = nn.ModuleDict({"query": nn.Linear(cfg.d_model, cfg.d_model)})
        self.bank = nn.Linear(cfg.d_model, ROWS, bias=False)

    def forward(self, *args, **kwargs):
        x = super().forward(*args, **kwargs)  # (B, T, D)
        return x + torch.softmax(self.bank(self.memory["query"](x)), -1) @ self.bank.weight

    def param_roles(self):
        return [Rule(r"memory\..*", "memory"), Rule(r"bank\..*", "memory_bank"), *super().param_roles()]

    def flops(self, seq_len):
        bank = self.bank.weight.numel()
        return super().flops(seq_len) + matmul_flops(self.cfg.d_model**2 + bank) + matmul_flops(bank)

    def passes(self, path):
        return 2.0 if path == "bank" else 1.0  # its rows are keys and values


class Adapter(DefaultModelAdapter):
    @classmethod
    def build_model(cls, model_class, model_cfg):
        return Recalling(model_cfg)
