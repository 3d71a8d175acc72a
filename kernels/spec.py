"""What tests, the ahead-of-time check and the benchmark need to know of an operation, said once, beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels import KERNELS

__all__ = ["Sample", "Size", "Spec", "drawn", "ids", "spec_of"]

Size = Mapping[str, int | float | bool | str]  # what a sample is made of, by name: rows, width, ...


@dataclass
class Sample:
    """Arguments of one call, all by keyword. Tensors that gradients are asked of have `requires_grad`. `known`: what
    the rule of choice may know of it besides (`kernels.choose.Call`), where not every implementation can run it."""

    tensors: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)

    def call(self, implementation: Callable[..., Any]) -> tuple[Tensor, ...]:
        """The outputs of an implementation; those that gradients flow through are what `requires_grad`."""
        found = implementation(**self.tensors, **self.options)
        return tuple(t for t in (found if isinstance(found, tuple) else (found,)) if t is not None)

    @property
    def differentiable(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors.items() if t is not None and t.requires_grad}

    def map(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """The same call with other tensors of the same values: `change` of each, in another dtype, device or layout."""
        made: dict[str, Tensor | None] = {}
        for name, t in self.tensors.items():
            made[name] = None if t is None else change(t).detach().requires_grad_(t.requires_grad)
        return Sample(made, self.options, self.known)


@dataclass(frozen=True)
class Spec:
    """One operation.

    `sample(size, device, dtype, generator)` draws a call; on the meta device it must draw nothing (see `drawn`).
    `small`: sizes that tests run, by name: odd ones, one row, none, past the edge of a tile; the first is that of the
    fast tier. `large`: those that are compiled ahead of time and timed, by name, as they occur in models;
    `timed_on_cpu`: of a size that a CPU can time. `flops(size)` and `bytes(size, itemsize)`: (forward, backward) of
    the least that must be computed and moved. `tolerance`: by name of dtype, the largest deviation from the reference
    in fp64, relative to the largest value of each output and gradient. `peers`: by name, "module:function" of the same
    signature that raises ImportError where the library is not installed; it may return the first outputs alone.
    `dots`: kernels whose binaries must multiply on tensor cores; `narrow`: by name of a large size those of them whose
    tiles have fewer than the 64 rows that newer instructions need. `gradients_in_forward`: implementations and peers
    whose forward pass computes gradients already, so that its time compares with no other's.
    """

    sample: Callable[[Size, torch.device, torch.dtype, torch.Generator], Sample]
    small: Mapping[str, Size]
    large: Mapping[str, Size]
    timed_on_cpu: Mapping[str, Size]
    flops: Callable[[Size], tuple[float, float]]
    bytes: Callable[[Size, int], tuple[float, float]]
    tolerance: Mapping[str, float]
    peers: Mapping[str, str] = field(default_factory=dict)
    dots: tuple[str, ...] = ()
    narrow: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gradients_in_forward: tuple[str, ...] = ()


def spec_of(op: str) -> Spec | None:
    """`SPEC` of the module of the operation's function; None without one."""
    return getattr(import_module(KERNELS[op].factory.partition(":")[0]), "SPEC", None)


def drawn(
    *shape: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    grad: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Normal numbers, drawn in fp32 on the CPU, so that a seed gives the same ones everywhere; on the meta device
    none."""
    if device.type == "meta":
        return torch.empty(shape, device=device, dtype=dtype, requires_grad=grad)
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_(grad)


def ids(count: int, *shape: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Uniform numbers from 0 to `count` - 1, int64, as `drawn`."""
    if device.type == "meta":
        return torch.empty(shape, device=device, dtype=torch.int64)
    return torch.randint(count, shape, generator=generator).to(device)
