"""Every operation of torch.library, by what its SPEC says: against the reference in fp64, on a CPU; Triton kernels
interpreted."""

from __future__ import annotations

import pytest
import torch

from kernels import KERNELS
from tests.kernels.interpret import interpreted, poisoned
from tests.kernels.samples import (
    CASES,
    FIRST,
    LAYOUTS,
    UPSTREAM,
    close,
    drawn,
    exactly,
    gradients,
    run_of,
    upstream,
)


def check(op, name, size, dtype=torch.float32, layout=lambda t: t, change=lambda t: t, slack=1.0) -> None:
    """`layout` of upstream gradients; `change` of every input; `slack` times the SPEC's tolerance."""
    spec, sample = drawn(op, size, dtype)
    sample = sample.map(change)
    exact, expected = exactly(op, sample)
    tolerance = slack * spec.tolerance[str(dtype).removeprefix("torch.")]
    with interpreted(), poisoned():
        found = sample.call(run_of(op, name))
        dy = upstream(found, layout)
        grads = gradients(found, sample, dy)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.requires_grad == b.requires_grad
        close(a, b, tolerance, f"output {i}")
    wanted = gradients(expected, exact, [g.double() for g in dy])
    for name, grad in grads.items():
        assert grad.dtype == sample.tensors[name].dtype
        close(grad, wanted[name], tolerance, f"gradient of {name}")


def named(layouts):
    return pytest.mark.parametrize("layout", layouts, ids=lambda layout: layout.__name__)


@pytest.mark.parametrize(("op", "name", "size"), FIRST)
def test_outputs_and_gradients_equal_the_reference(op, name, size):
    check(op, name, size)


@pytest.mark.slow
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("op", "name", "size"), CASES)
def test_every_size(op, name, size, narrow):
    half = torch.float16 if "float16" in KERNELS[op].implementations[name].dtypes else torch.bfloat16
    check(op, name, size, half if narrow else torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "name", "size"), FIRST)
def test_bf16_is_raised_where_it_is_loaded(op, name, size):
    """The interpreter computes rubbish in bf16, a GPU slightly wrong sums."""
    check(op, name, size, torch.bfloat16)


@pytest.mark.slow
@named(UPSTREAM)
@pytest.mark.parametrize(("op", "name", "size"), FIRST)
def test_gradients_that_come_in_any_layout(op, name, size, layout):
    check(op, name, size, layout=layout)


@pytest.mark.slow
@named(LAYOUTS)
@pytest.mark.parametrize(("op", "name", "size"), FIRST)
def test_inputs_in_any_layout(op, name, size, layout):
    check(op, name, size, change=layout)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0, 1e-4, 30])
@pytest.mark.parametrize(("op", "name", "size"), FIRST)
def test_extreme_values(op, name, size, factor):
    """Without overflow, and exact at zero. What is small against what it is subtracted from has lost some digits."""
    check(op, name, size, change=lambda t: t * factor if t.requires_grad else t, slack=50)
