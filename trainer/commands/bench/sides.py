"""Who is compared in `bench kernels`: ours, the reference, compiled, others'; right before they are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import KERNELS, REFERENCE
from kernels.against import deviations, upstream
from kernels.choose import Call, Kernels
from kernels.spec import Sample, Size, Spec
from naming import load

__all__ = ["AGAIN", "COMPILED", "WRONG", "Inputs", "Side", "right_sides", "sides_of"]

COMPILED, AGAIN = (
    "reference compiled",
    "reference again",
)  # the second is the same side twice: what noise does


WRONG = "WRONG"
ON_CUDA = (
    "liger",
    "quack",
    "flash_attn",
    "cut_cross_entropy",
    "sdpa cuDNN",
    "sdpa efficient",
)  # peers that run there
ANOTHER_THING = 0.5  # a peer that is off by more does not compute the same


@dataclass(frozen=True)
class Side:
    name: str
    run: Callable[..., Any]
    peer: bool = False


class Inputs:
    """Arguments of one call and its upstream gradients; `refill` makes them what they were, since some libraries write
    into what they are given."""

    def __init__(self, spec: Spec, size: Size, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.sample = spec.sample(size, device, dtype, torch.Generator().manual_seed(seed))
        self.dy: list[Tensor] = []
        self._kept: list[tuple[Tensor, Tensor]] = []

    def complete(self, run: Callable[..., Any]) -> Inputs:
        """With upstream gradients of the shapes that `run` returns."""
        self.dy = upstream(self.sample.call(run))
        tensors = [t for t in self.sample.tensors.values() if t is not None]
        self._kept = [(t, t.detach().clone()) for t in (*tensors, *self.dy)]
        return self

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.sample.tensors.values() if t is not None)

    def refill(self) -> None:
        with torch.no_grad():
            for t, was in self._kept:
                t.copy_(was)

    def forward(self, run: Callable[..., Any]) -> tuple[Tensor, ...]:
        return self.sample.call(run)

    def both(self, run: Callable[..., Any]) -> tuple[Tensor, ...]:
        """Forward and, where there is one, backward, into new gradients."""
        ways = [y for y in self.sample.call(run) if y.requires_grad]
        wanted = list(self.sample.differentiable.values())
        return torch.autograd.grad(ways, wanted, self.dy) if ways else ()


def sides_of(
    op: str, device: torch.device, dtype: torch.dtype, spec: Spec, compiled: bool
) -> tuple[list[Side], dict[str, str]]:
    """Every implementation that can run here, and those that cannot with the reason; peers are found out by a call."""
    sides, left_out = [], {}
    for name, way in KERNELS[op].implementations.items():
        if lacking := Kernels().lacking(op, name, Call(device, dtype)):
            left_out[name] = lacking
        else:
            sides.append(Side(name, load(way.where)))
    reference = load(KERNELS[op].implementations[REFERENCE].where)
    if KERNELS[op].implementations[REFERENCE].host_syncs:
        left_out[COMPILED] = "it fetches numbers that sizes depend on, and every other size would be compiled"
    elif compiled:
        torch._dynamo.reset()
        sides.append(Side(COMPILED, torch.compile(reference, dynamic=False)))
    for name, where in spec.peers.items():
        if name in ON_CUDA and device.type != "cuda":
            left_out[name] = f"runs on cuda, and this is {device.type}"
        else:
            sides.append(Side(name, load(where), peer=True))
    return [*sides, Side(AGAIN, reference)], left_out


def _lacking(op: str, side: Side, sample: Sample, dtype: torch.dtype) -> str:
    """Why an implementation of ours cannot run this call, where the call itself matters."""
    if side.peer or side.name not in KERNELS[op].implementations:
        return ""
    device = next(t.device for t in sample.tensors.values() if t is not None)
    return Kernels().lacking(op, side.name, Call(device, dtype, **sample.known))


def right_sides(
    op: str, sides: list[Side], spec: Spec, sample: Sample, dtype: torch.dtype
) -> tuple[list[Side], dict[str, str]]:
    """Those that run and agree with the reference in fp64; and remarks, why the others are not among them. A peer that
    is less exact is among them, with a remark."""
    reference = load(KERNELS[op].implementations[REFERENCE].where)
    allowed = spec.tolerance[str(dtype).removeprefix("torch.")]
    right, remarks = [], {}
    for side in sides:
        if lacking := _lacking(op, side, sample, dtype):
            remarks[side.name] = lacking
            continue
        try:
            found = deviations(side.run, reference, sample.map(torch.clone), peer=side.peer)
        except ImportError as error:
            remarks[side.name] = f"not installed ({error.name or error})"
        except NotImplementedError as error:  # a call that a library has no form for
            remarks[side.name] = str(error) if side.peer else f"{WRONG}: {error}"
        except (
            Exception
        ) as error:  # what a machine does that it was not made for: said, and the others measured
            if side.run is reference:
                raise
            first = (str(error).splitlines() or [""])[0]
            failed = f"failed with {type(error).__name__}: {first}"
            remarks[side.name] = failed if side.peer else f"{WRONG}: {failed}"
        else:
            name, worst = max(found.items(), key=lambda item: item[1])
            said = f"{name} is off by {worst:.2g} of its largest value, {allowed:.2g} is allowed"
            if worst <= allowed or (side.peer and worst <= ANOTHER_THING):
                right.append(side)
            if worst > allowed:
                remarks[side.name] = f"{'less exact' if side in right else WRONG}: {said}"
    return right, remarks
