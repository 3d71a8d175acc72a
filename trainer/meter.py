"""Sums between two log lines, kept on the device until they are read."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapters.base import Figures, Metric, StepOutput

if TYPE_CHECKING:
    from trainer.distributed import World

__all__ = ["Meter"]


class Meter:
    """Adds up loss terms, metrics and operations of every micro-batch; `read` reduces them over processes and starts
    anew.

    Denominators, tokens and bytes are host numbers that are already global; everything else is local. Nothing but
    `read`, `flops` and `state_dict`, which all processes call together, waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self._reset()

    def _reset(self) -> None:
        # "<kind>/<name>" -> local value; kinds are term, mean, sum, max, last, count, figures (of which all numbers,
        # in one dimension), and flops without a name.
        self._sums: dict[str, float | Tensor] = {}
        self._figures: dict[str, tuple[Figures, torch.Size]] = {}
        self._denominator_of: dict[str, str] = {}
        self._likelihoods: list[str] = []  # terms
        self._totals: dict[str, float] = {}  # global: denominators, tokens, bytes, steps

    def copy(self) -> Meter:
        """One that what is added to this one does not reach."""
        new = copy.copy(self)
        new._sums, new._figures, new._totals = dict(self._sums), dict(self._figures), dict(self._totals)
        new._denominator_of, new._likelihoods = dict(self._denominator_of), list(self._likelihoods)
        return new

    def add_output(self, output: StepOutput, planned_flops: float = 0.0) -> None:
        """One micro-batch. `planned_flops` counts where the output does not say what it took."""
        for name, term in output.terms.items():
            self._denominator_of[name] = term.denominator
            if term.likelihood and name not in self._likelihoods:
                self._likelihoods.append(name)
            self._accumulate(f"term/{name}", term.sum)
        self.add_metrics(output.metrics)
        self._accumulate("flops/", planned_flops if output.flops is None else output.flops)

    def add_metrics(self, metrics: Mapping[str, Metric]) -> None:
        for name, metric in metrics.items():
            if metric.figures is not None:
                total = self._tensor(metric.sum)
                self._figures[name] = (metric.figures, total.shape)
                self._accumulate(f"figures/{name}", total.flatten())
                continue
            self._accumulate(f"{metric.reduce}/{name}", metric.sum)
            self._accumulate(f"count/{name}", metric.count)

    def _accumulate(self, key: str, value: float | Tensor) -> None:
        if isinstance(value, Tensor):
            value = value.detach().to(self._device, self._dtype)
        old = self._sums.get(key)
        if old is None or key.startswith("last/"):
            self._sums[key] = value
        elif key.startswith("max/"):
            self._sums[key] = torch.maximum(self._tensor(old), self._tensor(value))
        else:
            self._sums[key] = old + value

    def _tensor(self, value: float | list[float] | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=self._dtype, device=self._device)

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

    def _gathered(self, world: World) -> dict[str, Any]:
        """Global sums, lists where there are several. The only place where the host waits for the device."""
        if not self._sums:
            return {}
        keys = sorted(self._sums)
        on_device = {k: v.reshape(-1) for k in keys if isinstance(v := self._sums[k], Tensor)}
        arrived = iter(torch.cat(list(on_device.values())).tolist() if on_device else [])
        local = {
            k: list(islice(arrived, len(on_device[k]))) if k in on_device else [float(self._sums[k])]
            for k in keys
        }
        values = [value for k in keys for value in local[k]]
        sums = dict(_parts(local, world.add_up(values)))
        if any(k.startswith("max/") for k in keys):
            sums |= {k: v for k, v in _parts(local, world.maximum(values)) if k.startswith("max/")}
        return sums

    def flops(self, world: World) -> float:
        """Operations since the last read."""
        return self._gathered(world).get("flops/", 0.0)

    def read(self, world: World) -> dict[str, float]:
        """Since the last read: means of every loss term and metric, `loss`, `bits_per_byte` of the first term where it
        is a likelihood; `flops` in sum. What was counted nowhere has no mean."""
        sums = self._gathered(world)
        out: dict[str, float] = {}
        for key, value in sums.items():
            kind, name = key.split("/", 1)
            if kind == "term":
                out[f"loss_{name}"] = value / max(self._totals[self._denominator_of[name]], 1e-30)
            elif kind == "mean":
                if sums[f"count/{name}"] > 0:
                    out[name] = value / sums[f"count/{name}"]
            elif kind == "last":
                out[name] = value / world.size
            elif kind in ("sum", "max"):
                out[name] = value
            elif kind == "figures":
                figures, shape = self._figures[name]
                out |= figures(torch.tensor(value, dtype=torch.float64).view(shape))
            elif kind == "flops":
                out["flops"] = value
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
        return {
            "sums": self._gathered(world),
            "denominator_of": self._denominator_of,
            "likelihoods": self._likelihoods,
            "totals": self._totals,
        }

    def load_state_dict(self, state: dict[str, Any], world: World) -> None:
        _require_written(state)
        share = 1.0 if world.is_main else 0.0  # they are global sums: one process carries them
        # Counts had a mapping of their own once.
        saved = {**state["sums"], **{f"count/{k}": v for k, v in state.get("counts", {}).items()}}
        self._sums = {
            k: self._tensor(v) * share if isinstance(v, list) else v if k.startswith("max/") else v * share
            for k, v in saved.items()
        }
        self._denominator_of, self._totals = dict(state["denominator_of"]), dict(state["totals"])
        self._likelihoods = list(state["likelihoods"])


def _require_written(state: Any) -> None:
    """TypeError where it is no `state_dict`."""

    def are(found: Any, kind: type | tuple[type, ...]) -> bool:
        return isinstance(found, dict) and all(
            isinstance(key, str) and isinstance(value, kind) for key, value in found.items()
        )

    numbers = (int, float)
    lists = [value for value in state["sums"].values() if isinstance(value, list)]
    whole = are(state["sums"], (*numbers, list)) and are(state.get("counts", {}), numbers)
    whole = whole and all(isinstance(number, numbers) for value in lists for number in value)
    whole = whole and are(state["denominator_of"], str) and are(state["totals"], numbers)
    if not whole or not all(isinstance(name, str) for name in state["likelihoods"]):
        raise TypeError("no sums between two log lines")


def _parts(local: Mapping[str, list[float]], values: Iterable[float]) -> Iterator[tuple[str, Any]]:
    """`values`, which lie one after the other, by the keys of `local`."""
    left = iter(values)
    for key, own in local.items():
        part = list(islice(left, len(own)))
        yield key, part if key.startswith("figures/") else part[0]
