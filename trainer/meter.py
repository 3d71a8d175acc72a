"""Sums between two log lines, kept on the device until they are read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapters.base import StepOutput

if TYPE_CHECKING:
    from trainer.distributed import World

__all__ = ["Meter"]


class Meter:
    """Adds up loss terms and metrics of every micro-batch; `read` reduces them over processes and starts anew.

    Denominators, tokens and bytes are host numbers that are already global; everything else is local.
    """

    def __init__(self, device: torch.device) -> None:
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}  # "<reduce>/<name>" -> local value
        self._counts: dict[str, float | Tensor] = {}  # host numbers or device scalars
        self._denominator_of: dict[str, str] = {}
        self._likelihoods: list[str] = []  # terms
        self._totals: dict[str, float] = {}  # global: denominators, tokens, bytes, steps

    def add_output(self, output: StepOutput) -> None:
        for name, term in output.terms.items():
            self._denominator_of[name] = term.denominator
            if term.likelihood and name not in self._likelihoods:
                self._likelihoods.append(name)
            self._accumulate(f"term/{name}", term.sum)
        for name, metric in output.metrics.items():
            self._accumulate(f"{metric.reduce}/{name}", metric.sum)
            self._counts[name] = self._counts.get(name, 0.0) + metric.count

    def _accumulate(self, key: str, value: Tensor) -> None:
        value = value.detach().to(self._dtype)
        old = self._sums.get(key)
        if old is None or key.startswith("last/"):
            self._sums[key] = value
        else:
            self._sums[key] = torch.maximum(old, value) if key.startswith("max/") else old + value

    def add_step(self, denominators: dict[str, float], tokens: float, bytes_: float) -> None:
        for name, value in {
            **denominators,
            "tokens seen": tokens,
            "bytes seen": bytes_,
            "steps": 1.0,
        }.items():
            self._totals[name] = self._totals.get(name, 0.0) + value

    @property
    def steps(self) -> int:
        return int(self._totals.get("steps", 0))

    def _gathered(self, world: World) -> tuple[dict[str, float], dict[str, float]]:
        """Global sums and counts. The only place where the host waits for the device."""
        keys, names = sorted(self._sums), sorted(self._counts)
        values = torch.stack([self._sums[k] for k in keys]).tolist() if keys else []
        added = world.add_up([*values, *(float(self._counts[n]) for n in names)])
        sums = dict(zip(keys, added, strict=False))
        if any(k.startswith("max/") for k in keys):
            largest = dict(zip(keys, world.maximum(values), strict=True))
            sums |= {k: v for k, v in largest.items() if k.startswith("max/")}
        return sums, dict(zip(names, added[len(keys) :], strict=True))

    def read(self, world: World) -> dict[str, float]:
        """Means since the last read: every loss term, every metric, `loss`, `bits_per_byte` of the first term where it
        is a likelihood. What was counted nowhere has no mean."""
        sums, counts = self._gathered(world)
        out: dict[str, float] = {}
        for key, value in sums.items():
            kind, name = key.split("/", 1)
            if kind == "term":
                out[f"loss_{name}"] = value / max(self._totals[self._denominator_of[name]], 1e-30)
            elif kind == "mean":
                if counts[name] > 0:
                    out[name] = value / counts[name]
            elif kind == "last":
                out[name] = value / world.size
            else:
                out[name] = value
        if self._denominator_of:
            first = next(iter(self._denominator_of))
            out["loss"] = out[f"loss_{first}"]
            if first in self._likelihoods:
                nats = sums[f"term/{first}"]
                out["bits_per_byte"] = nats / math.log(2) / max(self._totals["bytes seen"], 1.0)
        self._reset()
        return out

    def state_dict(self, world: World) -> dict[str, Any]:
        """The unread sums, so that the log line after a resume is the one an unbroken run writes."""
        sums, counts = self._gathered(world)
        return {
            "sums": sums,
            "counts": counts,
            "denominator_of": self._denominator_of,
            "likelihoods": self._likelihoods,
            "totals": self._totals,
        }

    def load_state_dict(self, state: dict[str, Any], world: World) -> None:
        share = 1.0 if world.is_main else 0.0  # they are global sums: one process carries them
        self._sums = {
            k: torch.tensor(v if k.startswith("max/") else v * share, dtype=self._dtype, device=self._device)
            for k, v in state["sums"].items()
        }
        self._counts = {k: v * share for k, v in state["counts"].items()}
        self._denominator_of, self._totals = dict(state["denominator_of"]), dict(state["totals"])
        self._likelihoods = list(state["likelihoods"])
