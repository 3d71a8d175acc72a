"""The selective scan in its implementations: lengths, lanes, documents, states handed on, memory."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import kernels.selective_scan.chunked as chunked
import kernels.selective_scan.cpp as cpp
from kernels import CHUNKED, CPP, KERNELS, REFERENCE, TRITON
from kernels.against import deviations, gradients, in_fp64, upstream
from kernels.choose import Call, Kernels
from kernels.selective_scan import FEW_STEPS, ONE_STEP, SPEC, selective_scan
from kernels.spec import Sample
from naming import load
from tests.kernels.interpret import interpreted
from trainer.commands.bench.measure import peak_bytes
from trainer.commands.bench.sides import Inputs, Side

EXACT = [REFERENCE, CHUNKED]  # these compute in fp64 too
WAYS = [*EXACT, CPP, pytest.param(TRITON, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def without_a_gpu(request):
    with interpreted() if TRITON in request.node.name else nullcontext():
        yield


def run_of(name):
    return load(KERNELS["selective_scan"].implementations[name].where)


def sample_of(rows, length, width=6, states=4, dtype=torch.float32, **more):
    size = {"rows": rows, "length": length, "width": width, "states": states, **more}
    return SPEC.sample(size, torch.device("cpu"), dtype, torch.Generator().manual_seed(length))


def slow(sample):
    """With decays of 0.98 to 1 a step: what is lost between blocks, lanes and documents would show."""
    with torch.no_grad():
        sample.tensors["A"].copy_(
            -torch.linspace(1e-3, 0.02, sample.tensors["A"].numel()).view_as(sample.tensors["A"])
        )
        sample.tensors["delta"].clamp_(-1, 0.5)
        for name in ("delta_bias", "z"):
            if sample.tensors[name] is not None:
                sample.tensors[name].fill_(0.1)
    return sample


def check(sample, tolerance=1e-5, name=CHUNKED):
    wrong = {n: d for n, d in deviations(run_of(name), run_of(REFERENCE), sample).items() if d > tolerance}
    assert not wrong


@pytest.mark.parametrize("size", SPEC.small)
def test_every_output_and_gradient(size):
    check(
        SPEC.sample(SPEC.small[size], torch.device("cpu"), torch.float32, torch.Generator().manual_seed(1)),
        2e-5,
    )


@pytest.mark.parametrize("length", [1, 7, 15, 16, 17, 64, 130])
def test_lengths_that_blocks_do_not_divide(length):
    """Also the tail of the last block: a large bias and a fast decay, with a gradient of the last states."""
    sample = sample_of(1, length, initial=True)
    with torch.no_grad():
        sample.tensors["delta_bias"].fill_(3)
        sample.tensors["A"].fill_(-8)
        sample.tensors["A"][:, 0] = -0.01
    check(sample)


@pytest.mark.slow
@pytest.mark.parametrize("length", [31, 32, 33, 170])
def test_blocks_of_triton(length):
    """Six blocks of slow decays in the longest, from states that are not zero."""
    check(slow(sample_of(1, length, 3, 2, initial=True, reset=length // 2)), 2e-5, TRITON)


@pytest.mark.parametrize("rows", [1, 3])
def test_states_are_carried(rows):
    """Five lanes and more of slow decay, from states that are not zero; without the carry y would be another."""
    sample = slow(sample_of(rows, 163, initial=True, bare=True))
    assert chunked.spans(1, 163, 6, 4)[0].lanes == 5
    check(sample)
    y = run_of(CHUNKED)(**sample.tensors)[0]
    later = {n: t[:, 128:] for n, t in sample.tensors.items() if n in ("u", "delta", "B", "C")}
    alone = run_of(CHUNKED)(**{**sample.tensors, **later, "initial": None})[0]
    assert (y[:, 128:] - alone).norm() > 0.1 * y[:, 128:].norm()


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("rows", [1, 2])
def test_documents_are_scanned_as_if_alone(name, rows):
    """They start inside blocks and lanes, decays are slow, and last states are those of the last one; gradients too."""
    lengths = [20, 1, 43, 64, 5]
    sample = slow(sample_of(rows, sum(lengths)))
    ends = torch.tensor(lengths).cumsum(0)
    first = torch.zeros(rows, sum(lengths), dtype=torch.bool)
    first[:, ends[:-1]] = True
    together = Sample({**sample.tensors, "reset": first})
    found = together.call(run_of(name))
    dy = upstream(found)
    along = ("u", "delta", "B", "C", "z")
    ys = []
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        part = {n: t[:, start:end] if n in along else t for n, t in sample.tensors.items()}
        y, last = run_of(REFERENCE)(**part)
        ys.append(y)
    apart = (torch.cat(ys, 1), last)
    torch.testing.assert_close(found, apart, atol=1e-5, rtol=1e-5)
    wanted = gradients(apart, sample, dy)
    for n, grad in gradients(found, together, dy).items():
        torch.testing.assert_close(grad, wanted[n], atol=1e-4, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", WAYS)
def test_a_document_knows_nothing_of_the_one_before(name):
    sample = slow(sample_of(2, 50, reset=20))
    y = run_of(name)(**sample.tensors)[0]
    changed = {n: sample.tensors[n].detach().clone() for n in ("u", "delta", "B", "C", "z")}
    for t in changed.values():
        t[:, 18] += 1  # the last step before one
    other = run_of(name)(**{**sample.tensors, **changed})[0]
    assert torch.equal(y[:, 19:], other[:, 19:]) and not torch.equal(y[:, 18], other[:, 18])


@pytest.mark.parametrize("name", [REFERENCE, CPP])
def test_what_is_no_number_stays_in_its_document(name):
    sample = slow(sample_of(2, 50, reset=20, initial=True))
    with torch.no_grad():
        sample.tensors["u"][:, 5], sample.tensors["initial"][:, 0] = torch.inf, torch.nan
    y, last = run_of(name)(**sample.tensors)
    assert not y[:, 18].isfinite().all() and y[:, 19:].isfinite().all() and last.isfinite().all()


@pytest.mark.parametrize("name", WAYS)
def test_a_state_handed_on_is_as_if_never_left(name):
    sample = slow(sample_of(2, 100, initial=True))
    y, last = run_of(name)(**sample.tensors)
    along = ("u", "delta", "B", "C", "z")
    state, ys = sample.tensors["initial"], []
    for part in (slice(0, 41), slice(41, 42), slice(42, 100)):
        tensors = {n: t[:, part] if n in along else t for n, t in sample.tensors.items()}
        found, state = run_of(name)(**{**tensors, "initial": state})
        ys.append(found)
    torch.testing.assert_close((torch.cat(ys, 1), state), (y, last), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WAYS)
def test_no_step_passes_the_input_on_and_no_memory_forgets(name):
    sample = sample_of(2, 40)
    given = {**sample.tensors, "z": None}
    y, last = run_of(name)(**{**given, "delta_bias": torch.full((6,), -60.0)})
    torch.testing.assert_close(y, given["D"] * given["u"])
    assert last.abs().max() < 1e-20
    y, _ = run_of(name)(**{**given, "A": torch.full((6, 4), -1e9), "D": None})
    step = F.softplus(given["delta"] + given["delta_bias"])
    torch.testing.assert_close(y, step * given["u"] * (given["B"] * given["C"]).sum(-1, keepdim=True))


@pytest.mark.parametrize("name", EXACT)
def test_gradients_equal_differences(name):
    exact = in_fp64(sample_of(2, 19, 3, 2, initial=True, reset=7))
    names = list(exact.differentiable)

    def call(*tensors):
        return run_of(name)(**{**exact.tensors, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(call, [exact.tensors[n] for n in names], fast_mode=True)


@pytest.mark.parametrize(
    ("size", "dtype"), [("1 x 1,024 x 384", torch.float32), ("16 x 256 x 384", torch.bfloat16)]
)
@pytest.mark.parametrize("name", [CHUNKED, CPP])
def test_no_tensor_holds_the_states_of_all_steps(name, size, dtype):
    """At most six times what u takes, beside the states that are kept; of states of all steps alone it would be 16."""
    inputs = Inputs(SPEC, SPEC.timed_on_cpu[size], torch.device("cpu"), dtype, 0)
    u = inputs.sample.tensors["u"]
    kept = 4 * math.prod({CHUNKED: chunked, CPP: cpp}[name].kept_shape(*u.shape, 16))
    run = run_of(name)
    peak = peak_bytes(Side(name, run), inputs.complete(run), torch.device("cpu"))
    assert 2 * u.nbytes < peak - kept <= 6 * u.nbytes  # y and gradients alone are more than two


@pytest.mark.parametrize("name", ["delta", "z"])
def test_steps_and_gates_may_be_more_exact_than_inputs(name):
    sample = sample_of(2, 20, dtype=torch.bfloat16)
    sample.tensors[name] = sample.tensors[name].detach().float().add_(1e-4).requires_grad_()
    found = deviations(run_of(CPP), run_of(REFERENCE), sample)
    assert max(found.values()) < 3e-2 and found[f"gradient of {name}"] < 5e-3
    assert (
        gradients(sample.call(run_of(CPP)), sample, upstream(sample.call(run_of(CPP))))[name].dtype
        == torch.float32
    )


def test_autocast_leaves_it_alone():
    sample = sample_of(2, 20)
    y, last = run_of(CHUNKED)(**sample.tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = run_of(CHUNKED)(**sample.tensors)
    assert torch.equal(found[0], y) and torch.equal(found[1], last)


def test_shapes_that_do_not_fit_are_refused():
    tensors = sample_of(2, 5).tensors
    with pytest.raises(ValueError, match=r"B must have the shape \(2, 5, 4\)"):
        selective_scan(**{**tensors, "B": torch.zeros(2, 4, 4)}, kernels=Kernels())
    with pytest.raises(ValueError, match="reset must be bool"):
        selective_scan(**{**tensors, "reset": torch.zeros(2, 5)}, kernels=Kernels())


def test_what_is_forgotten_leaves_nothing():
    """Decays that underflow are 0: denormal numbers in their place take five times as long."""
    sample = sample_of(2, 1, initial=True)
    with torch.no_grad():
        sample.tensors["u"].zero_()
        sample.tensors["A"].fill_(-1e9)
    assert not run_of(CPP)(**sample.tensors)[1].any()


def test_choice():
    def choice(device="cpu", dtype=torch.float32, facts=()):
        return Kernels().foresee("selective_scan", Call(torch.device(device), dtype, columns=8, facts=facts))[
            0
        ]

    assert choice() == choice(facts=(FEW_STEPS,)) == CPP and choice(facts=(ONE_STEP, FEW_STEPS)) == REFERENCE
    assert (
        choice(dtype=torch.float64) == CHUNKED
        and choice(dtype=torch.float64, facts=(FEW_STEPS,)) == REFERENCE
    )
    with torch.no_grad():
        for length, name in ((1, REFERENCE), (2, CPP)):
            run = Kernels()
            selective_scan(**sample_of(2, length).tensors, kernels=run)
            assert [*run.used["selective_scan"]] == [name]
