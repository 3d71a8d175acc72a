"""Every Triton kernel, by what its operation's SPEC says: against the reference in fp64, interpreted, on a CPU."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from kernels import KERNELS, TRITON
from kernels.spec import Sample, Spec, spec_of
from naming import load
from tests.kernels.interpret import interpreted, poisoned

OPERATIONS = [op for op, kernel in KERNELS.items() if TRITON in kernel.implementations]
CASES = [(op, size) for op in OPERATIONS for size in spec_of(op).small]
FIRST = [(op, next(iter(spec_of(op).small))) for op in OPERATIONS]


def drawn(op: str, size: str, dtype: torch.dtype = torch.float32) -> tuple[Spec, Sample]:
    spec = spec_of(op)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{op} {size}".encode()))
    return spec, spec.sample(spec.small[size], torch.device("cpu"), dtype, generator)


def ours(op: str, sample: Sample) -> tuple[Tensor, ...]:
    return sample.call(load(KERNELS[op].implementations[TRITON].where))


def exactly(op: str, sample: Sample) -> tuple[Sample, tuple[Tensor, ...]]:
    """The same call of the reference, in fp64."""
    exact = sample.map(lambda t: t.double() if t.is_floating_point() else t)
    exact.options = {
        name: torch.float64 if isinstance(value, torch.dtype) else value
        for name, value in sample.options.items()
    }
    return exact, exact.call(load(KERNELS[op].implementations["reference"].where))


def upstream(outputs: tuple[Tensor, ...], shape_of: str = "plain") -> list[Tensor]:
    """A gradient for each differentiable output, of the wanted layout; the same numbers where layouts allow."""
    found = []
    for i, y in enumerate(t for t in outputs if t.requires_grad):
        g = torch.Generator().manual_seed(i)
        values = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
        if shape_of == "expanded":
            values = values.flatten()[:1].view((1,) * y.ndim).expand(y.shape) if y.numel() else values
        elif shape_of == "sliced" and y.ndim:
            values = torch.stack((values, torch.full_like(values, torch.nan)), -1).flatten(-2)[..., ::2]
        elif shape_of == "transposed" and y.ndim > 1:
            values = values.transpose(0, -1).contiguous().transpose(0, -1)
        elif shape_of == "part of a row" and y.ndim:
            values = torch.cat((values, torch.full_like(values, torch.nan)), -1)[..., : y.shape[-1]]
        found.append(values)
    return found


def gradients(outputs: tuple[Tensor, ...], sample: Sample, dy: list[Tensor]) -> dict[str, Tensor]:
    wanted = sample.differentiable
    ways = [t for t in outputs if t.requires_grad]
    found = torch.autograd.grad(ways, list(wanted.values()), dy)
    return dict(zip(wanted, found, strict=True))


def close(found: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == exact.shape, what
    if not exact.numel():
        return
    worst = (found.double() - exact.double()).abs().max().item()
    scale = exact.abs().max().item()
    assert worst <= tolerance * max(scale, 1e-3), f"{what}: off by {worst:.3g} of {scale:.3g}"


def check(op: str, size: str, dtype: torch.dtype = torch.float32, layout: str = "plain", change=None) -> None:
    spec, sample = drawn(op, size, dtype)
    if change is not None:
        sample = sample.map(change)
    exact, expected = exactly(op, sample)
    tolerance = spec.tolerance[str(dtype).removeprefix("torch.")]
    with interpreted(), poisoned():
        found = ours(op, sample)
        dy = upstream(found, layout)
        grads = gradients(found, sample, dy)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.requires_grad == b.requires_grad
        close(a, b, tolerance, f"output {i}")
    wanted = gradients(expected, exact, [g.double() for g in dy])
    for name, grad in grads.items():
        assert grad.dtype == sample.tensors[name].dtype
        close(grad, wanted[name], tolerance, f"gradient of {name}")


@pytest.mark.parametrize(("op", "size"), FIRST)
def test_outputs_and_gradients_equal_the_reference(op, size):
    check(op, size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("op", "size"), CASES)
def test_every_size(op, size, dtype):
    check(op, size, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["expanded", "sliced", "transposed", "part of a row"])
@pytest.mark.parametrize(("op", "size"), FIRST)
def test_gradients_that_come_in_any_layout(op, size, layout):
    check(op, size, layout=layout)
