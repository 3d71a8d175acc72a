"""The causal convolution: what the generic tests of kernels do not ask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.against import deviations, gradients, upstream
from kernels.causal_conv1d import SPEC, causal_conv1d
from kernels.causal_conv1d.closed_form import closed_form
from kernels.causal_conv1d.reference import reference
from kernels.choose import Call, Kernels
from kernels.spec import drawn
from tests.kernels import samples
from tests.kernels.interpret import interpreted
from tests.kernels.samples import LAYOUTS, close, transposed

CPU = torch.device("cpu")
EVERY = ("reference", "closed_form", "triton")


def call_of(batch=2, tokens=9, channels=6, taps=4, dtype=torch.float32) -> list[Tensor]:
    """x, weight, bias and inputs before."""
    g = torch.Generator().manual_seed(tokens)
    shapes = (batch, tokens, channels), (channels, 1, taps), (channels,), (batch, taps - 1, channels)
    return [drawn(*shape, device=CPU, dtype=dtype, generator=g) for shape in shapes]


@pytest.fixture(autouse=True)
def without_a_gpu():
    with interpreted():
        yield


def run(name: str, *args: Tensor | None, activation: bool = True) -> Tensor:
    return causal_conv1d(*args, activation=activation, kernels=Kernels({"causal_conv1d": name}))


@pytest.mark.parametrize("name", EVERY)
def test_it_is_torchs_convolution(name):
    x, weight, bias, _ = call_of()
    expected = F.conv1d(x.transpose(1, 2), weight, bias, padding=3, groups=6)[..., :9].transpose(1, 2)
    torch.testing.assert_close(run(name, x, weight, bias, activation=False), expected)
    torch.testing.assert_close(run(name, x, weight, bias), F.silu(expected))


@pytest.mark.parametrize("layout", [torch.clone, transposed])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SPEC.small)
def test_gradients_by_formula_are_those_of_the_definition(size, dtype, layout):
    spec, sample = samples.drawn("causal_conv1d", size, getattr(torch, dtype))
    found = deviations(closed_form, reference, sample.map(layout))
    assert max(found.values()) <= spec.tolerance[dtype], found


@pytest.mark.parametrize("layout", [samples.expanded, *LAYOUTS], ids=lambda layout: layout.__name__)
def test_gradients_that_come_in_any_layout(layout):
    _, sample = samples.drawn("causal_conv1d", "2 x 13 x 24, documents, initial")
    outputs = sample.call(closed_form)
    dy = upstream(outputs, layout)
    found = gradients(outputs, sample, dy)
    alone = gradients(sample.call(closed_form), sample, [g.contiguous() for g in dy])
    for name, grad in alone.items():
        close(found[name], grad, 1e-6, name)


def test_gradients_by_formula_equal_differences():
    x, weight, bias, initial = (t.detach().double().requires_grad_() for t in call_of(tokens=5, channels=2))
    ids = torch.tensor([[0, 0, 1, 1, 1], [4, 4, 4, 4, 4]])

    def call(*tensors: Tensor) -> Tensor:
        return closed_form(*tensors, ids, activation=True)

    torch.autograd.gradcheck(call, (x, weight, bias, initial))


@pytest.mark.parametrize("name", EVERY)
def test_documents_are_alone(name):
    """Also one whose id was there before, shorter than the taps; and the inputs before are the first one's."""
    x, weight, bias, initial = call_of(batch=1, tokens=12)
    lengths = [2, 1, 5, 4]
    ids = torch.tensor([3, 8, 3, 5]).repeat_interleave(torch.tensor(lengths))[None]
    y = run(name, x, weight, bias, initial, ids)
    parts = x.split(lengths, 1)
    alone = [run(name, part, weight, bias, None if i else initial) for i, part in enumerate(parts)]
    torch.testing.assert_close(y, torch.cat(alone, 1))
    dy = torch.arange(72, dtype=y.dtype).view_as(y).sin()
    ways = x, weight, bias, initial
    torch.testing.assert_close(
        torch.autograd.grad(y, ways, dy), torch.autograd.grad(torch.cat(alone, 1), ways, dy)
    )


@pytest.mark.parametrize("name", EVERY)
def test_another_document_and_what_comes_later_are_not_seen(name):
    x, weight, bias, _ = call_of(tokens=8)
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]).expand(2, -1)
    y = run(name, x, weight, bias, None, ids)
    with torch.no_grad():
        x[:, 2] += 3
        x[:, 6] += 3
    changed = run(name, x, weight, bias, None, ids)
    assert torch.equal(y[:, 3:6], changed[:, 3:6]) and torch.equal(y[:, :2], changed[:, :2])
    assert not torch.equal(y[:, 2], changed[:, 2]) and not torch.equal(y[:, 6], changed[:, 6])


@pytest.mark.parametrize("name", EVERY)
def test_what_is_no_number_stays_in_its_document(name):
    """Also in gradients, both ways, and where the inputs before the first token are none."""
    x, weight, bias, initial = call_of(batch=1, tokens=12)
    ids = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3]])
    dy = torch.ones_like(x)
    for bad, touched in ((x[:, 2:6], slice(2, 6)), (dy[:, 2:6], slice(2, 6)), (initial, slice(0, 2))):
        kept = bad.detach().clone()
        with torch.no_grad():
            bad.fill_(torch.nan)
        y = run(name, x, weight, bias, initial, ids)
        (dx,) = torch.autograd.grad(y, x, dy)
        for t in (y, dx):
            beyond = torch.ones(12, dtype=torch.bool)
            beyond[touched] = False
            assert t[:, beyond].isfinite().all()
        with torch.no_grad():
            bad.copy_(kept)


@pytest.mark.parametrize("tokens", [31, 33, 65])
@pytest.mark.parametrize("name", EVERY)
def test_ids_behind_the_last_token_are_not_read(name, tokens):
    x, weight, bias, _ = call_of(tokens=tokens, channels=3)
    rows = torch.full((2, tokens + 64), 2**40)
    rows[:, :tokens] = torch.arange(tokens) // 5
    found = run(name, x, weight, bias, None, rows[:, :tokens])
    torch.testing.assert_close(found, run("reference", x, weight, bias, None, rows[:, :tokens].clone()))


@pytest.mark.parametrize("cuts", [(1,) * 9, (5, 4), (1, 8), (8, 1)], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_parts_one_after_the_other_give_the_whole(name, cuts):
    x, weight, bias, recent = call_of()
    whole = run(name, x, weight, bias, recent)
    found = []
    for part in x.split(cuts, 1):
        found.append(run(name, part, weight, bias, recent))
        recent = torch.cat((recent, part), 1)[:, -3:]
    torch.testing.assert_close(torch.cat(found, 1), whole)


@pytest.mark.parametrize("name", EVERY)
def test_weights_stay_wide_beside_narrow_inputs(name):
    """As under autocast: sums in fp32, the result like x, gradients like what they are of."""
    x, weight, bias, _ = call_of()
    narrow = x.detach().bfloat16().requires_grad_()
    y = run(name, narrow, weight, bias)
    grads = torch.autograd.grad(y.float().sum(), (narrow, weight, bias))
    assert [t.dtype for t in (y, *grads)] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(
        y.float(), run(name, narrow.detach().float(), weight, bias), rtol=1e-2, atol=1e-2
    )


def test_recomputed_in_the_backward_pass():
    x, weight, bias, _ = call_of()

    def call() -> Tensor:
        return closed_form(x, weight, bias, None, None, activation=True)

    again = torch.utils.checkpoint.checkpoint(call, use_reentrant=False)
    found, plain = (torch.autograd.grad(y.sin().sum(), (x, weight, bias)) for y in (again, call()))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_choice():
    def choice(device, **more):
        call = Call(torch.device(device), more.pop("dtype", torch.float32), **more)
        return Kernels().foresee("causal_conv1d", call)[0]

    assert choice("cpu") == "cpp" and choice("cpu", dtype=torch.float64) == "closed_form"
    assert choice("cpu", compiling=True) == choice("meta") == "reference"


def test_shapes_that_do_not_fit():
    x, weight, bias, initial = call_of()
    for args in (
        (x, weight[:, 0], bias),
        (x, weight[:5], bias),
        (x[0], weight, bias),
        (x, weight, bias[:5]),
        (x, weight, bias, initial[:, 1:]),
        (x, weight, bias, None, torch.zeros(2, 8)),
    ):
        with pytest.raises(ValueError, match=r"x \(B, T, E\), weight \(E, 1, k\)"):
            causal_conv1d(*args, activation=True, kernels=Kernels())
