"""State-space duality: what the generic tests of kernels do not ask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.against import deviation, deviations, gradients, in_fp64, upstream
from kernels.choose import Call, Kernels
from kernels.selective_scan import selective_scan
from kernels.spec import Sample, drawn
from kernels.ssd import SPEC, ssd
from kernels.ssd.chunked import chunked
from kernels.ssd.cpp import cpp
from kernels.ssd.reference import reference
from tests.kernels import samples
from tests.kernels.samples import UPSTREAM, close

CPU = torch.device("cpu")
CHUNKED = Kernels({"ssd": "chunked"})
EVERY = [Kernels({"ssd": name}) for name in ("reference", "chunked")]
IN_FP32 = pytest.mark.parametrize("run", [chunked, cpp], ids=["chunked", "cpp"])


def call_of(tokens=37, heads=2, width=3, states=4, groups=1, chunk=8, rows=1, dtype=torch.float64) -> Sample:
    """Slow decays, and states that were there before."""
    g = torch.Generator().manual_seed(tokens + chunk)

    def draw(*shape: int) -> Tensor:
        return drawn(*shape, device=CPU, dtype=dtype, generator=g)

    tensors = {
        "x": draw(rows, tokens, heads, width),
        "delta": draw(rows, tokens, heads),
        "A": (torch.rand(heads, generator=g) * -0.02).to(dtype).requires_grad_(),
        "B": draw(rows, tokens, groups, states),
        "C": draw(rows, tokens, groups, states),
        "D": draw(heads),
        "delta_bias": draw(heads),
        "initial": draw(rows, heads, width, states),
        "doc_ids": None,
    }
    return Sample(tensors, {"chunk": chunk})


def compared(sample: Sample, run=chunked) -> dict[str, float]:
    return deviations(run, reference, sample)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SPEC.small)
def test_chunks_give_what_the_recurrence_does(size, dtype):
    spec, sample = samples.drawn("ssd", size, getattr(torch, dtype))
    found = compared(sample)
    assert max(found.values()) <= spec.tolerance[dtype], found


def test_a_head_of_one_channel_is_a_selective_scan():
    """Version 1 with one rate of decay for all states of a channel, and step sizes of its own."""
    sample = call_of(21, heads=6, width=1, rows=2)
    t = sample.tensors
    y, last = sample.call(reference)
    rates = t["A"][:, None].expand(6, t["B"].shape[-1])
    given = (t["x"][..., 0], t["delta"], rates, t["B"][:, :, 0], t["C"][:, :, 0], t["D"], None)
    scanned, state = selective_scan(*given, t["delta_bias"], t["initial"][:, :, 0], None, kernels=Kernels())
    torch.testing.assert_close(scanned, y[..., 0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, last[:, :, 0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 8, 64])
@pytest.mark.parametrize("tokens", [1, 7, 64, 130])
def test_any_chunk_of_any_length(tokens, chunk):
    found = compared(call_of(tokens, chunk=chunk, rows=2, heads=4, groups=2))
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("layout", UPSTREAM, ids=lambda layout: layout.__name__)
def test_gradients_that_come_in_any_layout(layout):
    sample = call_of(11, chunk=4, rows=2)
    outputs, expected = sample.call(chunked), sample.call(reference)
    found = gradients(outputs, sample, upstream(outputs, layout))
    for name, grad in gradients(expected, sample, upstream(expected)).items():
        if layout is not samples.expanded:
            close(found[name], grad, 1e-12, name)
    alone = gradients(sample.call(chunked), sample, [g.contiguous() for g in upstream(outputs, layout)])
    assert all(deviation(found[name], alone[name]) < 1e-13 for name in alone)


def test_any_chunk_of_any_length_compiled():
    for tokens in (1, 7, 64, 130):
        for chunk in (1, 7, 8, 33, 64):
            sample = call_of(tokens, chunk=chunk, rows=2, heads=4, groups=2, dtype=torch.float32)
            found = compared(sample, cpp)
            assert max(found.values()) < 1e-5, (tokens, chunk, found)


@IN_FP32
def test_what_is_carried_from_chunk_to_chunk_is_seen(run):
    """One row, five chunks, decays that keep almost everything; without states of before the result is another."""
    sample = call_of(40, dtype=torch.float32)
    found = compared(sample, run)
    assert max(found.values()) < 1e-5, found
    y, _ = sample.call(run)
    cut = call_of(40, dtype=torch.float32)
    parts = [
        Sample(
            {
                n: t if t is None or t.ndim < 3 or n == "initial" else t[:, i : i + 8]
                for n, t in cut.tensors.items()
            }
            | {"initial": None},
            {"chunk": 8},
        ).call(run)[0]
        for i in range(0, 40, 8)
    ]
    forgetful = torch.cat(parts, 1)
    assert (y - forgetful).norm() > 0.1 * y.norm(), "the test is blind"


def with_documents(sample: Sample, lengths: list[int]) -> list[slice]:
    ids = torch.tensor([7, 3, 3, 9, 7])  # of neighbours alike: none; one comes again
    ids[2] = 1
    sample.tensors["doc_ids"] = ids[: len(lengths)].repeat_interleave(torch.tensor(lengths))[None]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - n, end) for n, end in zip(lengths, ends, strict=True)]


@pytest.mark.parametrize("run", [reference, chunked])
def test_documents_that_start_inside_a_chunk_are_alone(run):
    lengths = [20, 1, 43, 64, 5]
    sample = call_of(sum(lengths), chunk=32)
    spans = with_documents(sample, lengths)
    y, last = sample.call(run)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    together = gradients((y, last), sample, [dy, torch.ones_like(last)])
    total = {name: torch.zeros_like(t) for name, t in sample.differentiable.items()}
    for i, span in enumerate(spans):
        parts = {n: t if t is None or t.ndim < 3 else t[:, span] for n, t in sample.tensors.items()}
        parts["initial"] = sample.tensors["initial"] if i == 0 else None
        parts["doc_ids"] = None
        alone, state = run(**parts, chunk=32)
        torch.testing.assert_close(y[:, span], alone, rtol=1e-12, atol=1e-12)
        ways, upstreams = (alone, state), (dy[:, span], torch.ones_like(state))
        count = 2 if i + 1 == len(spans) else 1  # only the last document's states are handed on
        names = [n for n in total if not (n == "initial" and i)]
        grads = torch.autograd.grad(
            ways[:count], [sample.tensors[n] for n in names], upstreams[:count], allow_unused=True
        )
        for name, grad in zip(names, grads, strict=True):
            total[name] += 0 if grad is None else grad
    torch.testing.assert_close(last, state, rtol=1e-12, atol=1e-12)
    for name in total:
        close(together[name], total[name], 1e-12, name)


@pytest.mark.parametrize("kernels", [*EVERY, Kernels({"ssd": "cpp"})])
def test_another_document_is_not_seen(kernels):
    sample = call_of(21, dtype=torch.float32)
    first, second = with_documents(sample, [10, 11])
    y, last = ssd(**sample.tensors, chunk=8, kernels=kernels)
    with torch.no_grad():
        for name in ("x", "delta", "B", "C"):
            sample.tensors[name][:, first.stop - 1] += 3
    changed, last_changed = ssd(**sample.tensors, chunk=8, kernels=kernels)
    assert torch.equal(y[:, second], changed[:, second]) and torch.equal(last, last_changed)
    assert not torch.equal(y[:, first], changed[:, first])


@IN_FP32
def test_slow_steps_behind_one_that_forgets_everything(run):
    """Steps of -10,000 among -0.001, fp32, each gradient by itself: a difference of cumulative sums loses what the slow
    ones are, or is above 0 and overflows."""
    sample = call_of(64, chunk=32, dtype=torch.float32)
    rates = torch.full((1, 64, 2), 1e-3)
    rates[:, 5::11] = 1e4
    with torch.no_grad():
        sample.tensors["A"].fill_(-1.0)
        sample.tensors["delta_bias"].zero_()
        sample.tensors["delta"].copy_(rates + (-torch.expm1(-rates)).log())  # softplus of it
        sample.tensors["x"][:, 5::11] /= 1e4
    found = compared(sample, run)
    assert max(found.values()) < 2e-5, found
    y, _ = sample.call(run)
    assert torch.isfinite(y).all()


@IN_FP32
def test_decay_behind_a_boundary_keeps_its_digits(run):
    """39 steps of -0.01 behind a document's start: exp(-0.39) = 0.677, of a state that began there."""
    sample = call_of(60, heads=1, width=1, states=1, chunk=64, dtype=torch.float32)
    with_documents(sample, [20, 40])
    with torch.no_grad():
        for name in ("x", "B", "C"):
            sample.tensors[name].fill_(1)
        sample.tensors["D"].zero_()
        sample.tensors["delta_bias"].zero_()
        sample.tensors["A"].fill_(-0.01)
        sample.tensors["delta"].fill_(math.log(math.e - 1))  # softplus of it: 1
        sample.tensors["x"][:, 21:] = 0
    y, _ = sample.call(run)
    assert y[0, -1].item() == pytest.approx(math.exp(-0.39), rel=1e-6)


@pytest.mark.parametrize("kernels", EVERY)
def test_the_tail_of_a_chunk_changes_no_state(kernels):
    """Steps behind the last token would have softplus(bias), which decays fast here."""
    for tokens in (1, 7, 8, 9):
        sample = call_of(tokens, chunk=8)
        with torch.no_grad():
            sample.tensors["delta_bias"].fill_(3)
            sample.tensors["A"].fill_(-8)
        found = deviations(
            lambda **k: ssd(**{n: v for n, v in k.items()}, kernels=kernels), reference, sample
        )
        assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("kernels", EVERY)
def test_two_parts_one_after_the_other_give_the_whole(kernels):
    sample = call_of(21)
    whole, last = ssd(**sample.tensors, chunk=8, kernels=kernels)
    found, state = [], sample.tensors["initial"]
    for span in (slice(0, 13), slice(13, 14), slice(14, 21)):
        part = {n: t if t is None or t.ndim < 3 else t[:, span] for n, t in sample.tensors.items()}
        y, state = ssd(**{**part, "initial": state}, chunk=8, kernels=kernels)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernels", EVERY)
def test_extremes_of_time(kernels):
    sample = call_of(9)
    given = sample.tensors
    with torch.no_grad():
        given["delta"].zero_()
        given["delta_bias"].fill_(-60)
        given["initial"].zero_()
        y, _ = ssd(**given, chunk=4, kernels=kernels)
        torch.testing.assert_close(y, given["D"][:, None] * given["x"])  # no time passes: nothing enters
        given["delta_bias"].fill_(1)
        given["A"].fill_(-1e6)
        y, _ = ssd(**given, chunk=4, kernels=kernels)
        step = torch.nn.functional.softplus(torch.ones(1, dtype=y.dtype))
        seen = (given["B"] * given["C"]).sum(-1)[..., None] * step
        torch.testing.assert_close(y, (seen + given["D"][:, None]) * given["x"])  # all is forgotten at once


def test_choice():
    def choice(device, facts=(), **wanted):
        call = Call(torch.device(device), torch.bfloat16, columns=8, facts=facts)
        return Kernels(wanted).foresee("ssd", call)

    assert choice("cpu") == ("cpp", "auto: products of chunks, and compiled passes between them")
    assert choice("meta") == ("chunked", "auto: products of chunks")
    assert choice("cpu", ("one token",)) == ("reference", "auto: one token is one step")
    assert choice("cpu", ssd="reference")[0] == "reference"
    kernels = Kernels()
    for tokens in (1, 5):
        ssd(**call_of(tokens).tensors, chunk=4, kernels=kernels)
    assert set(kernels.used["ssd"]) == {"reference", "chunked"}  # these tensors are fp64


def test_shapes_that_do_not_fit():
    given = {**call_of(5).tensors, "chunk": 4}
    for wrong, message in (
        ({"delta": given["delta"][:, 1:]}, r"delta must be \(1, 5, 2\)"),
        ({"initial": given["initial"].mT}, r"initial must be \(1, 2, 3, 4\)"),
        (
            {"B": given["B"].expand(-1, -1, 3, -1), "C": given["C"].expand(-1, -1, 3, -1)},
            "2 heads cannot share 3",
        ),
        ({"x": given["x"][0]}, r"x \(B, T, H, P\)"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ssd(**{**given, **wrong}, kernels=Kernels())


@pytest.mark.slow
@pytest.mark.parametrize("size", ["plain", "2 x 11, 4 heads of 3 in 2 groups"])
def test_compiled_gradients_are_the_eager_ones(size):
    _, sample = samples.drawn("ssd", size)
    torch._dynamo.reset()
    compiled = torch.compile(chunked, backend="aot_eager", fullgraph=True)
    found, expected = sample.call(compiled), sample.call(chunked)
    dy = upstream(expected)
    pairs = gradients(found, sample, dy), gradients(expected, sample, dy)
    for name in pairs[0]:
        close(pairs[0][name], pairs[1][name], 1e-6, name)


def test_recomputed_in_the_backward_pass():
    sample = call_of(11)
    found = torch.utils.checkpoint.checkpoint(lambda: sample.call(chunked), use_reentrant=False)
    dy = upstream(found)
    again, plain = gradients(found, sample, dy), gradients(sample.call(chunked), sample, dy)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_fp64_stays_fp64():
    y, last = in_fp64(samples.drawn("ssd", "plain")[1]).call(chunked)
    assert y.dtype == last.dtype == torch.float64
