"""A whole step of Muon, ours by each way of `newton_schulz`, against that of `torch.optim.Muon`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kernels import KERNELS, REFERENCE
from kernels.choose import Call, Kernels
from kernels.newton_schulz.peers import torch_muon
from trainer.commands.bench.sides import AGAIN, WRONG
from trainer.commands.bench.turns import interleaved, median_ratio
from trainer.optim.muon import Muon, iteration_dtype

__all__ = ["SIZES", "muon_step", "report"]

THEIRS = "torch.optim.Muon"
SIZES = {  # blocks, width: a GPT-2 of 124 million parameters; `nano`
    "cuda": {"blocks": 12, "width": 768},
    "cpu": {"blocks": 4, "width": 192},
}
ROUNDING = 0.05  # of the change, in norm: torch iterates in bf16


def muon_step(device: torch.device, turns: int) -> dict[str, Any]:
    """Seconds of a step by side, who take turns, each on fp32 matrices (m, n) of its own, with gradients."""
    size = SIZES.get(device.type, SIZES["cpu"])
    weights = _matrices(size, device)
    sides = {THEIRS: torch_muon(weights)}
    expected, remarks = _change(sides[THEIRS], weights), {}
    call = Call(device, iteration_dtype(torch.float32, device.type), columns=size["width"])
    for way in KERNELS["newton_schulz"].implementations:
        if lacking := Kernels().lacking("newton_schulz", way, call):
            remarks[way] = lacking
            continue
        try:
            sides[way] = _ours(size, device, way, expected)
        except (
            Exception
        ) as error:  # what a machine does that it was not made for: said, and the others measured
            remarks[way] = f"{WRONG}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if REFERENCE in sides:
        sides[AGAIN] = _ours(size, device, REFERENCE, expected)
    seconds = interleaved({name: _in_a_turn(step) for name, step in sides.items()}, turns, device)
    rows = {
        name: {
            "seconds": statistics.median(taken),
            "times_torch": median_ratio(seconds[THEIRS], taken),
        }
        for name, taken in seconds.items()
        if name != AGAIN
    }
    noise = abs(median_ratio(seconds[REFERENCE], seconds[AGAIN]) - 1) if AGAIN in seconds else None
    return {**size, "noise": noise, "sides": rows, "remarks": remarks}


def _ours(size: Mapping[str, int], device: torch.device, way: str, expected: Tensor) -> Callable[[], None]:
    """A step of ours that changes weights as `expected`. ValueError if it does not."""
    weights = _matrices(size, device)
    optimizer = Muon([{"params": weights}], lr=0.02, weight_decay=0.1)  # as `torch_muon`
    optimizer.kernels = Kernels({"newton_schulz": way})
    off = ((_change(optimizer.step, weights) - expected).norm() / expected.norm()).item()
    if not off <= ROUNDING:
        raise ValueError(f"its step differs from that of {THEIRS} by {off:.2g} of it")
    return optimizer.step


def _in_a_turn(step: Callable[[], None]) -> Callable[[int], None]:
    return lambda turn: step()


def _change(step: Callable[[], None], weights: list[Parameter]) -> Tensor:
    """(numbers,), by one step."""
    before = [w.detach().clone() for w in weights]
    step()
    return torch.cat([(w.detach() - b).flatten() for w, b in zip(weights, before, strict=True)])


def _matrices(size: Mapping[str, int], device: torch.device) -> list[Parameter]:
    """Attention's four and the MLP's two of every block."""
    width, generator = size["width"], torch.Generator().manual_seed(0)
    shapes = [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)] * size["blocks"]
    found = []
    for shape in shapes:
        found.append(Parameter((0.02 * torch.randn(shape, generator=generator)).to(device)))
        found[-1].grad = torch.randn(shape, generator=generator).to(device)
    return found


def report(found: Mapping[str, Any]) -> list[str]:
    noise = "" if found["noise"] is None else f" · the same twice differs by {found['noise']:.1%}"
    lines = [
        f"a step of Muon · {found['blocks']} blocks of width {found['width']}, fp32{noise}",
        f"{'':<22}{'ms':>10}  x {THEIRS}",
    ]
    for name, row in found["sides"].items():
        lines.append(f"  {name:<20}{1e3 * row['seconds']:>10.2f}  {row['times_torch']:.2f}")
    return [*lines, *(f"  {name:<20}{why}" for name, why in found["remarks"].items())]
