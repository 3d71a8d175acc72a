"""Every operation of torch.library: registration, compilation and recomputation, on a CPU (Triton interpreted)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.utils.checkpoint import checkpoint

from kernels import CHUNKED, CPP, KERNELS, REFERENCE
from kernels.spec import Sample, spec_of
from tests.kernels.interpret import interpreted
from tests.kernels.samples import FIRST, close, drawn, exactly, gradients, in_fp64, run_of, upstream

pytestmark = pytest.mark.slow
Change = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


@contextmanager
def recorded() -> Iterator[list[tuple]]:
    """Calls of our operations of torch.library: (operation, arguments, keyword arguments), as they came."""
    call, found = CustomOpDef.__call__, []

    def recording(self, *args, **kwargs):
        # In a backward pass saved tensors still say `requires_grad`; nothing asks for gradients there.
        ask = torch.is_grad_enabled()

        def own(t):
            return t.detach().requires_grad_(ask and t.requires_grad) if isinstance(t, Tensor) else t

        found.append((self._opoverload, tuple(map(own, args)), {k: own(v) for k, v in kwargs.items()}))
        return call(self, *args, **kwargs)

    CustomOpDef.__call__ = recording
    try:
        yield found
    finally:
        CustomOpDef.__call__ = call


@pytest.mark.parametrize(("op", "name", "size"), FIRST)
def test_operations_are_registered_as_torch_asks(op, name, size):
    """Schema, aliases, gradients, and shapes without values, also of unknown sizes."""
    _, sample = drawn(op, size)
    with interpreted():
        with recorded() as calls:
            found = sample.call(run_of(op, name))
            gradients(found, sample, upstream(found))
        assert calls
        for operation, args, kwargs in calls:
            torch.library.opcheck(operation, args, kwargs)


def both_ways(
    op: str, name: str, sample: Sample, exact: Sample, change: Change = lambda outputs: outputs
) -> None:
    """Outputs and gradients of the compiled call equal those of the eager one, and of the reference (`exact`)."""
    run, options = run_of(op, name), sample.options

    def call(tensors: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
        return change(Sample(tensors, options).call(run))

    tolerance = spec_of(op).tolerance["float32"]
    with interpreted():
        torch._dynamo.reset()
        eager = call(sample.tensors)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(sample.tensors)
        dy = upstream(eager)
        grads = gradients(eager, sample, dy), gradients(compiled, sample, dy)
    expected = change(exact.call(run_of(op, REFERENCE)))
    wanted = gradients(expected, exact, [g.double() for g in dy])
    for i, (a, b, c) in enumerate(zip(eager, compiled, expected, strict=True)):
        assert a.requires_grad == b.requires_grad
        close(b, a, tolerance, f"compiled output {i}")
        close(a, c, tolerance, f"output {i}")
    for name in wanted:
        close(grads[1][name], grads[0][name], tolerance, f"compiled gradient of {name}")
        close(grads[0][name], wanted[name], tolerance, f"gradient of {name}")


@pytest.mark.parametrize(("op", "name", "size"), FIRST)
def test_compiled_without_a_graph_break(op, name, size):
    _, sample = drawn(op, size)
    both_ways(op, name, sample, in_fp64(sample))


@pytest.mark.parametrize(("op", "name", "size"), FIRST)
def test_an_operation_in_place_behind_it(op, name, size):
    """Gradients stay right, or torch says that backward needs what was overwritten: never wrong ones."""
    _, sample = drawn(op, size)
    try:
        both_ways(
            op,
            name,
            sample,
            in_fp64(sample),
            lambda ys: tuple(y.mul_(2) if y.requires_grad else y for y in ys),
        )
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)


def alike() -> list[tuple[str, str, str, str, str]]:
    """Operations with two arguments of one shape that gradients are asked of."""
    found = []
    for op, name, size in FIRST:
        if (op, name) == ("ssd", CPP):
            continue  # a function of autograd around operations, which the compiler refuses to give a tensor twice
        ways = drawn(op, size)[1].differentiable
        pairs = (
            (a, b)
            for a, b in itertools.combinations(ways, 2)
            if (ways[a].shape, ways[a].dtype) == (ways[b].shape, ways[b].dtype)
        )
        found += [(op, name, size, *pair) for pair in pairs]
    return found


@pytest.mark.parametrize(("op", "name", "size", "first", "second"), alike())
def test_one_tensor_as_two_arguments(op, name, size, first, second):
    _, sample = drawn(op, size)
    sample.tensors[second] = sample.tensors[first]
    exact = in_fp64(sample)
    exact.tensors[second] = exact.tensors[first]
    both_ways(op, name, sample, exact)


@pytest.mark.parametrize(("op", "name", "size"), FIRST)
def test_recomputed_in_the_backward_pass(op, name, size):
    spec, sample = drawn(op, size)
    exact, expected = exactly(op, sample)
    with interpreted():
        found = checkpoint(lambda: sample.call(run_of(op, name)), use_reentrant=False)
        dy = upstream(found)
        grads = gradients(found, sample, dy)
    wanted = gradients(expected, exact, [g.double() for g in dy])
    for name, grad in grads.items():
        close(grad, wanted[name], spec.tolerance["float32"], f"gradient of {name}")


PLAIN = [
    (op, name)
    for op, kernel in KERNELS.items()
    if (spec := spec_of(op)) and drawn(op, next(iter(spec.small)))[1].differentiable
    for name in (REFERENCE, CHUNKED)
    if name in kernel.implementations
]


@pytest.mark.parametrize(("op", "name"), PLAIN)
def test_gradients_of_plain_ways_equal_differences(op, name):
    _, sample = drawn(op, next(iter(spec_of(op).small)))
    exact = in_fp64(sample)
    names = list(exact.differentiable)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {**exact.tensors, **dict(zip(names, tensors, strict=True))}
        return tuple(y for y in Sample(given, exact.options).call(run_of(op, name)) if y.requires_grad)

    torch.autograd.gradcheck(call, [exact.tensors[n] for n in names], fast_mode=True)
