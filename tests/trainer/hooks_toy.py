"""Adapters that use what the contract offers beside the objective; see test_hooks.py."""

from __future__ import annotations

import torch

from adapters.base import Metric
from adapters.default import DefaultModelAdapter
from models.vanilla import Vanilla, VanillaConfig


class OnASphere(DefaultModelAdapter):
    """Rows of the embedding have norm 1."""

    def init_weights(self, generator):
        super().init_weights(generator)
        self.constrain(torch.zeros(()))

    def constrain(self, skipped):
        weight = self.model.embed_tokens.weight
        with torch.no_grad():
            weight.copy_(torch.where(skipped > 0, weight, weight / weight.norm(dim=1, keepdim=True)))


class OnABase(DefaultModelAdapter):
    """The embedding comes from elsewhere: all its numbers are `VALUE`."""

    VALUE = 0.02

    def external(self):
        return ["embed_tokens"]

    def provenance(self):
        return {"base": f"filled with {self.VALUE}"}

    def init_weights(self, generator):
        super().init_weights(generator)
        torch.nn.init.constant_(self.model.embed_tokens.weight, self.VALUE)


class OnALoadedBase(OnABase):
    """Puts a fresh module where the base was, as loaders do."""

    def init_weights(self, generator):
        super().init_weights(generator)
        loaded = torch.nn.Embedding(*self.model.embed_tokens.weight.shape)
        torch.nn.init.constant_(loaded.weight, self.VALUE)
        self.model.embed_tokens = loaded


class BytesByAdapter(DefaultModelAdapter):
    @classmethod
    def unit(cls, model_cfg):
        return "byte"


class WithADraw(DefaultModelAdapter):
    """Scales the loss of a step by a number that all its rows share, told by both ways that a step has."""

    heard: list[tuple[int, int, int]] = []

    def on_step_start(self, ctx, total_steps):
        self.heard.append((ctx.seed, ctx.step, total_steps))
        self.step = ctx.step

    def prepare(self, batch, ctx):
        prepared = super().prepare(batch, ctx)
        prepared.host["step"] = ctx.step
        return prepared

    def forward(self, prepared):
        output = super().forward(prepared)
        assert not self.training or prepared.host["step"] == self.step, "hook and rows are of one step"
        output.metrics["drawn"] = Metric(torch.tensor(float(prepared.host["step"])))
        return output


class StateOutside(DefaultModelAdapter):
    def __init__(self, *args):
        super().__init__(*args)
        self.own = torch.nn.Linear(2, 2)
        self.register_buffer("counts", torch.zeros(2))


class Bytes(Vanilla):
    class Config(VanillaConfig):
        unit = "byte"
