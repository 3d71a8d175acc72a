"""The linear scan: every path against the definition in fp64, chunks and segments at their edges, what is forgotten."""

from __future__ import annotations

import pytest
import torch

from kernels import KERNELS
from kernels.against import deviation, deviations
from kernels.choose import Kernels
from kernels.device import H100, as_if
from kernels.linear_scan import SPEC, linear_scan, reference
from kernels.linear_scan.chunked import CHUNK, chunked
from tests.kernels.interpret import interpreted, poisoned
from tests.kernels.samples import drawn

TRITON = pytest.importorskip("kernels.linear_scan.triton", reason="Triton is not installed")
WAYS = {"chunked": chunked, "reference": reference}


def call(rows, steps, width, *, dtype=torch.float64, every=0):
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(rows, steps, width, generator=generator, dtype=dtype)
    decay = torch.rand(rows, steps, generator=generator, dtype=dtype)
    if every:
        decay[:, ::every] = 0
    initial = torch.randn(rows, width, generator=generator, dtype=dtype)
    return [t.requires_grad_() for t in (x, decay, initial)]


@pytest.mark.parametrize("size", SPEC.small)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_chunks_equal_the_definition(size, dtype):
    spec, sample = drawn("linear_scan", size, getattr(torch, dtype))
    found = deviations(chunked, reference, sample)
    assert max(found.values()) <= spec.tolerance[dtype], found


@pytest.mark.parametrize("steps", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3])
def test_chunk_edges_in_fp64(steps):
    given = call(2, steps, 3, every=7)
    expected = reference(*given)
    found = chunked(*given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(found, given, dy), torch.autograd.grad(expected, given, dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_by_finite_differences():
    assert torch.autograd.gradcheck(chunked, call(2, 5, 2))


@pytest.mark.parametrize("way", WAYS)
def test_a_decay_of_zero_leaves_nothing_and_one_leaves_everything(way):
    """Also in the gradient: a logarithm of 0, or a difference of two sums of them, would not be finite."""
    x, decay, initial = call(1, 2 * CHUNK, 2)
    cut = CHUNK // 2
    with torch.no_grad():
        decay.fill_(1.0)
        decay[:, cut] = 0
    y = WAYS[way](x, decay, initial)
    torch.testing.assert_close(y[:, cut:], x[:, cut:].cumsum(1))
    torch.testing.assert_close(y[:, :cut], x[:, :cut].cumsum(1) + initial[:, None])
    dx, ddecay, dinitial = torch.autograd.grad(y[:, cut:].sum(), (x, decay, initial))
    assert not dx[:, :cut].any()
    assert not dinitial.any()
    assert ddecay.isfinite().all()
    assert ddecay[0, cut] == pytest.approx((y[0, cut - 1] * dx[0, cut]).sum().item())


@pytest.mark.parametrize("way", WAYS)
def test_no_step_sees_what_comes_later(way):
    x, decay, initial = (t.detach() for t in call(1, 2 * CHUNK + 5, 2))
    before = WAYS[way](x, decay, initial)
    for step in (1, CHUNK - 1, CHUNK, 2 * CHUNK):
        changed = x.clone(), decay.clone()
        changed[0][:, step:] += 1
        changed[1][:, step:] /= 2
        after = WAYS[way](*changed, initial)
        assert torch.equal(after[:, :step], before[:, :step])
        assert not torch.equal(after[:, step], before[:, step])


def test_in_pieces_as_in_one():
    x, decay, initial = (t.detach() for t in call(2, 50, 3))
    whole = linear_scan(x, decay, initial, kernels=Kernels())
    at, pieces = initial, []
    for piece, left in zip(x.split([20, 1, 29], 1), decay.split([20, 1, 29], 1), strict=True):
        pieces.append(linear_scan(piece, left, at, kernels=Kernels()))
        at = pieces[-1][:, -1]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("initial", [True, False])
def test_segments_of_a_long_row(initial):
    """Few channels on many multiprocessors: time is cut, in three segments of which the last is shorter."""
    x, decay, start = (t.detach().float().requires_grad_() for t in call(1, 800, 3, every=290))
    given = [x, decay, start if initial else None]
    with as_if(H100):
        _, segments, length = TRITON._cut("linear_scan.forward", x)
        assert segments == 3
        assert length * segments > 800
        with interpreted(), poisoned():
            found = TRITON.linear_scan(*given)
            grads = torch.autograd.grad(found.square().sum(), [t for t in given if t is not None])
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given]
    expected = reference(*exact)
    assert deviation(found, expected) < 1e-5
    wanted = torch.autograd.grad(expected.square().sum(), [t for t in exact if t is not None])
    assert max(map(deviation, grads, wanted)) < 1e-5


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((2, 3), (2, 3), None), "got x (2, 3), decay (2, 3)"),
        (((2, 3, 4), (2, 4), None), "decay (2, 4)"),
        (((2, 0, 4), (2, 0), None), "T >= 1"),
        (((2, 3, 4), (2, 3), (2, 3)), "initial (2, 3)"),
    ],
)
def test_shapes_that_do_not_fit(shapes, said):
    with pytest.raises(ValueError) as raised:
        linear_scan(*(None if shape is None else torch.ones(shape) for shape in shapes), kernels=Kernels())
    assert said in str(raised.value)


def test_what_is_chosen():
    kernels = Kernels()
    for steps in (2, 40):
        linear_scan(torch.ones(1, steps, 4), torch.ones(1, steps), kernels=kernels)
    assert list(kernels.used["linear_scan"]) == ["reference", "chunked"]
    assert set(KERNELS["linear_scan"].implementations) == {"reference", "chunked", "triton"}
