"""An implementation held against the reference in fp64, every output and gradient: for tests and the benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.spec import Sample

__all__ = ["deviation", "deviations", "gradients", "in_fp64", "upstream"]


def in_fp64(sample: Sample) -> Sample:
    """The same call in fp64, results included."""
    exact = sample.map(lambda t: t.double() if t.is_floating_point() else t)
    options = sample.options.items()
    exact.options = {name: torch.float64 if isinstance(v, torch.dtype) else v for name, v in options}
    return exact


def upstream(outputs: Sequence[Tensor], change: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
    """A gradient for each output that has one, drawn; `change` may give it another layout."""
    found = []
    for i, y in enumerate(t for t in outputs if t.requires_grad):
        values = torch.randn(y.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        found.append(change(values.to(y.device, y.dtype)))
    return found


def gradients(outputs: Sequence[Tensor], sample: Sample, dy: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of everything that wants one."""
    wanted = sample.differentiable
    ways = [t for t in outputs if t.requires_grad]
    if not wanted:  # an operation without gradients, such as an optimizer's
        assert not ways
        return {}
    return dict(zip(wanted, torch.autograd.grad(ways, list(wanted.values()), dy), strict=True))


def deviation(found: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest value, itself where all values are exactly 0; inf where one is not finite
    and the other is, or shapes differ."""
    if found.shape != exact.shape:
        return math.inf
    if not exact.numel():
        return 0.0
    found, exact = found.double(), exact.double()  # numbers of places and decisions too
    difference = torch.where(found == exact, 0.0, (found - exact).abs())
    largest = torch.where(exact.isfinite(), exact.abs(), 0).max().item()
    worst = difference.max().item() / (max(largest, 1e-3) if largest else 1.0)
    return worst if math.isfinite(worst) else math.inf


def deviations(
    run: Callable[..., Any], reference: Callable[..., Any], sample: Sample, *, peer: bool = False
) -> dict[str, float]:
    """`deviation` of every output and gradient of a call, by name. A `peer` may give but the first outputs."""
    found = sample.call(run)
    dy = upstream(found)
    grads = gradients(found, sample, dy)
    exact = in_fp64(sample)
    expected = exact.call(reference)
    wanted = gradients(expected, exact, [g.double() for g in dy])
    pairs = zip(found, expected[: len(found)] if peer else expected, strict=True)
    compared = {f"output {i}": deviation(a, b) for i, (a, b) in enumerate(pairs)}
    return compared | {f"gradient of {name}": deviation(grads[name], wanted[name]) for name in wanted}
