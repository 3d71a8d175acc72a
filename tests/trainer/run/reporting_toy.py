"""Adapters that report; see test_record.py."""

from __future__ import annotations

import torch

from adapters.base import LossTerm, Metric
from adapters.default import DefaultModelAdapter


class Reporting(DefaultModelAdapter):
    """Counts live on the device, and each micro-batch takes 1000 operations per row."""

    console_metrics = ("depth",)

    def active_parameters(self):
        return 1234

    def step_output(self, hidden, prepared):
        output = super().step_output(hidden, prepared)
        rows = torch.tensor(float(len(hidden.states)))
        depth = rows * (2 + prepared.host["step"])
        output.metrics |= {"depth": Metric(depth, rows), **{f"load_{i}": Metric(rows * i) for i in range(2)}}
        output.flops = 1000 * rows
        return output

    def prepare(self, batch, ctx):
        prepared = super().prepare(batch, ctx)
        prepared.host["step"] = ctx.step
        return prepared

    def heldout_metrics(self, hidden, prepared):
        scored = prepared.tensors["weights"].sum()
        return {"depth": Metric(7 * scored, scored)}


class CalledStep(DefaultModelAdapter):
    def step_output(self, hidden, prepared):
        output = super().step_output(hidden, prepared)
        output.metrics["step"] = Metric(torch.zeros(()))
        return output


class TermCalledScale(DefaultModelAdapter):
    def step_output(self, hidden, prepared):
        output = super().step_output(hidden, prepared)
        output.terms["scale"] = LossTerm(torch.zeros(()), "tokens", weight=0.0)
        return output


class ScoreCalledBytes(DefaultModelAdapter):
    def heldout_metrics(self, hidden, prepared):
        return {"bytes": Metric(torch.zeros(()))}
