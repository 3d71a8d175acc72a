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


SLOW = {"chunked": chunked, "reference": reference, "triton": TRITON.linear_scan}
in_fp32 = pytest.mark.parametrize("way", SLOW)


def slow_call(steps, generator_seed=0):
    """One row whose decays keep almost everything, and what comes before it."""
    generator = torch.Generator().manual_seed(generator_seed)
    x, initial = (torch.randn(*shape, generator=generator) for shape in ((1, steps, 3), (1, 3)))
    decay = torch.exp(-0.02 * torch.rand(1, steps, generator=generator))
    return x, decay, initial


def with_gradients(way, x, decay, initial, dy=None):
    """y, and the gradients of a sum weighted by `dy`."""
    given = [t.detach().clone().requires_grad_() for t in (x, decay, initial)]
    with interpreted(), poisoned():
        y = way(*given)
        dy = torch.ones_like(y) if dy is None else dy.to(y.dtype)
        return [y, *torch.autograd.grad(y, given, dy)]


@in_fp32
def test_what_is_carried_from_chunk_to_chunk_is_seen(way):
    """Five chunks of one row: without what comes before it, or before each chunk, the result is another."""
    given = slow_call(5 * CHUNK)
    found = with_gradients(SLOW[way], *given)
    for a, b in zip(found, with_gradients(reference, *(t.double() for t in given)), strict=True):
        assert deviation(a, b) < 1e-5
    x, decay, initial = given
    forgetful = torch.cat(
        [
            reference(x[:, i : i + CHUNK], decay[:, i : i + CHUNK], torch.zeros_like(initial))
            for i in range(0, 5 * CHUNK, CHUNK)
        ],
        1,
    )
    assert (found[0] - forgetful).norm() > 0.1 * found[0].norm(), "the test is blind"
    assert (found[0] - reference(x, decay, None)).norm() > 0.1 * initial.norm(), "the test is blind"


@in_fp32
def test_documents_that_start_inside_a_chunk_are_alone(way):
    """Values and every gradient, of documents short and long; among slow decays, which sums of logarithms lose."""
    lengths = [20, 1, 43, 64, 5]
    x, decay, initial = slow_call(sum(lengths))
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    decay[:, starts[1:]] = 0
    y, dx, ddecay, dinitial = with_gradients(SLOW[way], x, decay, initial, dy)
    for number, (start, n) in enumerate(zip(starts.tolist(), lengths, strict=True)):
        part = slice(start, start + n)
        before = torch.zeros_like(initial) if number else initial
        alone = with_gradients(
            reference, *(t.double() for t in (x[:, part], decay[:, part], before)), dy[:, part]
        )
        for a, b in zip(
            (y[:, part], dx[:, part], ddecay[:, part][:, 1:]), (*alone[:2], alone[2][:, 1:]), strict=True
        ):
            assert not b.numel() or deviation(a, b) < 1e-5
        assert number or deviation(dinitial, alone[3]) < 1e-5


@in_fp32
def test_slow_steps_behind_some_that_forget_everything(way):
    """exp(-10,000) among exp(-0.001): each gradient by itself."""
    x, decay, initial = slow_call(2 * CHUNK + 1)
    decay = torch.full_like(decay, -1e-3)
    decay[:, [3, CHUNK - 1, CHUNK, CHUNK + 9]] = -1e4
    given = x, decay.exp(), initial
    for a, b in zip(
        with_gradients(SLOW[way], *given),
        with_gradients(reference, *(t.double() for t in given)),
        strict=True,
    ):
        assert deviation(a, b) < 1e-5


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
