"""The row kernel of the head losses and the operation around it, interpreted: what sizes of the SPECs do not show."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import REFERENCE, TRITON
from kernels.aot import ahead_of_time
from kernels.choose import Kernels
from kernels.chunks import Rows, States
from kernels.device import A100, B200, H100
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_diffusion_loss import MODES
from kernels.spec import Sample, spec_of
from kernels.tuned import forced
from tests.kernels.interpret import interpreted, poisoned
from tests.kernels.samples import close, drawn, exactly, gradients, in_fp64, run_of, upstream

triton = pytest.importorskip("kernels.linear_cross_entropy.triton")
LOSSES = pytest.importorskip("kernels.linear_diffusion_loss.epilogues").LOSSES
CE, DIFFUSION = "linear_cross_entropy", "linear_diffusion_loss"
BY_TRITON = Kernels({CE: TRITON})


def sample_of(op: str, **size: object) -> Sample:
    generator = torch.Generator().manual_seed(5)
    return in_fp64(spec_of(op).sample(size, torch.device("cpu"), torch.float32, generator))


def in_pieces(monkeypatch, rows: int = 4):
    """Rows of so many a chunk, columns of 16 a tile."""
    monkeypatch.setattr(triton, "rows_at_once", lambda *args: rows)
    return forced("linear_loss.rows", {"BLOCK": 16})


def check_in_fp64(op: str, sample: Sample) -> None:
    """To the last digits, where a wrong edge of a tile or a chunk cannot hide."""
    expected = sample.call(run_of(op, REFERENCE))
    with interpreted(), poisoned():
        found = sample.call(run_of(op))
        dy = upstream(found)
        grads = gradients(found, sample, dy)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        close(a, b, 1e-11, f"output {i}")
    for name, wanted in gradients(expected, sample, dy).items():
        close(grads[name], wanted, 1e-11, f"gradient of {name}")


FAST = ("sedd_uniform", 0.5), ("d3pm_uniform", 0.5)
CASES = [
    pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
    for case in itertools.product(MODES, (0.0, 0.5, 1.0))
]


@pytest.mark.parametrize(("mode", "noisy"), CASES)
def test_every_loss_of_diffusion_over_tiles_and_chunks(mode, noisy, monkeypatch):
    with in_pieces(monkeypatch):
        check_in_fp64(
            DIFFUSION,
            sample_of(
                DIFFUSION,
                mode=mode,
                rows=6,
                width=5,
                vocabulary=37,
                padding=6,
                noisy=noisy,
                aux=MODES[mode].has_aux,
            ),
        )


@pytest.mark.parametrize(
    ("softcap", "targets", "z_loss"), [("", 1, 0.0), ("tanh", 3, 0.3), ("sigmoid", 2, 0.1)]
)
def test_cross_entropy_over_tiles_and_chunks(softcap, targets, z_loss, monkeypatch):
    size = {"rows": 6, "width": 5, "vocabulary": 37, "padding": 6, "ignored": True, "weighted": True}
    with in_pieces(monkeypatch):
        check_in_fp64(CE, sample_of(CE, **size, softcap=softcap, targets=targets, z_loss=z_loss))


def test_no_size_of_chunks_changes_the_loss(monkeypatch):
    sample, found = sample_of(CE, rows=5, width=3, vocabulary=9, weighted=True, z_loss=0.2), []
    for rows in (1, 3, 100):
        with interpreted(), in_pieces(monkeypatch, rows):
            outputs = sample.call(run_of(CE))
            found.append((*outputs, *gradients(outputs, sample, upstream(outputs)).values()))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            close(b, a, 1e-12, "other chunks")


@pytest.mark.parametrize("which", list(itertools.product([True, False], repeat=3)))
def test_every_combination_of_what_needs_a_gradient(which, monkeypatch):
    """A loss without one reads its logits and leaves them."""
    sample = sample_of(CE, rows=3, width=4, vocabulary=9, weighted=True)
    names = [n for n, wanted in zip(("hidden", "weight", "weights"), which, strict=True) if wanted]
    tensors = {n: None if t is None else t.detach() for n, t in sample.tensors.items()}
    expected = sample.call(run_of(CE, REFERENCE))
    wanted = gradients(expected, sample, upstream(expected))
    asked = []
    overwrite = triton.overwrite
    monkeypatch.setattr(triton, "overwrite", lambda *args: asked.append(args[4]) or overwrite(*args))
    some = Sample({n: t.requires_grad_() if n in names else t for n, t in tensors.items()}, sample.options)
    with interpreted(), poisoned():
        found = some.call(run_of(CE))
        with torch.no_grad():
            close(some.call(run_of(CE))[0], expected[0], 1e-12, "without gradients")
    assert asked == [which[0] or which[1], False]
    assert found[0].requires_grad == any(which)
    if names:
        for name, grad in gradients(found, some, upstream(found)).items():
            close(grad, wanted[name], 1e-12, name)


def test_gradients_of_the_sum_are_first_order_and_may_be_asked_for_twice():
    sample = sample_of(CE, rows=3, width=4, vocabulary=9)
    hidden = sample.tensors["hidden"]
    with interpreted():
        total, nats = sample.call(run_of(CE))
        assert not nats.requires_grad
        (once,) = torch.autograd.grad(total, hidden, retain_graph=True)
        (twice,) = torch.autograd.grad(total.square(), hidden, retain_graph=True)
        torch.testing.assert_close(twice, 2 * total.detach() * once)
        with pytest.raises(RuntimeError, match="kernels=reference has them"):
            torch.autograd.grad(total, hidden, create_graph=True)


def test_a_target_outside_of_the_vocabulary_is_no_number():
    """Neither is memory beside the row read."""
    hidden, weight = torch.ones(3, 2), torch.ones(8, 2)
    for target in (7, 8, 10**9, -1):
        with interpreted():
            total, nats, _ = linear_cross_entropy(
                hidden, weight, torch.tensor([0, target, -100]), vocab_size=7, kernels=BY_TRITON
            )
        assert total.isnan() and nats.isnan().tolist() == [False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("size", [60.0, 1e4])
@pytest.mark.parametrize("mode", ["cross-entropy", *MODES])
def test_logits_of_any_size(mode, size):
    """Score entropies are sums of exponentials: finite up to 60. The logits are numbers that fp32 holds."""
    if mode.startswith("sedd") and size > 60:
        pytest.skip("exp overflows, as it must")
    slack = 100 if mode == "d3pm_uniform" else 1  # its terms cancel, in torch too
    op = CE if mode == "cross-entropy" else DIFFUSION
    sample = sample_of(op, mode=mode, rows=6, width=2, vocabulary=11, noisy=0.7)
    with torch.no_grad():
        sample.tensors["hidden"].copy_(torch.tensor([1.0, 0.0]).expand(6, 2))
        sample.tensors["weight"].copy_(torch.linspace(-size, size, 11, dtype=torch.float64)[:, None])
    sample = sample.map(lambda t: t.float() if t.is_floating_point() else t)
    exact, expected = exactly(op, sample)
    with interpreted():
        found = sample.call(run_of(op))
        grads = gradients(found, sample, upstream(found))
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.isfinite().all()
        close(a, b, slack * 1e-5, f"output {i}")
    for name, wanted in gradients(expected, exact, [g.double() for g in upstream(expected)]).items():
        close(grads[name], wanted, slack * 2e-5, f"gradient of {name}")


def test_autocast_keeps_sums_in_fp32():
    _, sample = drawn(CE, "plain")
    exact, expected = exactly(CE, sample)
    hidden, weight, targets, _ = sample.tensors.values()
    with interpreted(), torch.autocast("cpu", torch.bfloat16):
        total, nats, _ = linear_cross_entropy(hidden, weight, targets, kernels=BY_TRITON)
    assert total.dtype == nats.dtype == torch.float32
    close(total, expected[0], 2e-2, "sum")
    wanted = gradients(expected, exact, [torch.ones((), dtype=torch.float64)])
    for name, grad in gradients((total,), sample, [torch.ones(())]).items():
        assert grad.dtype == torch.float32
        close(grad, wanted[name], 4e-2, name)


def test_flops_are_three_products_or_one():
    sample = sample_of(CE, rows=4, width=6, vocabulary=10)
    product = 2 * 4 * 6 * 10
    for frozen, products in ((False, 3), (True, 1)):
        with interpreted(), torch.set_grad_enabled(not frozen), FlopCounterMode(display=False) as counter:
            sample.call(run_of(CE))
        assert counter.get_total_flops() == products * product


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [A100, H100, B200], ids=lambda gpu: gpu.name)
def test_rows_are_read_in_wide_pipelined_loads_and_only_written_for_gradients(gpu):
    """Also where the vocabulary is no round number: the columns of the buffer are."""
    meta = {"device": "meta", "dtype": torch.float32}
    rows = Rows((torch.empty(512, device="meta", dtype=torch.int64),), torch.empty(512, **meta))
    z = torch.empty(512, 50_304, device="meta", dtype=torch.bfloat16)
    with ahead_of_time(gpu) as (binaries):
        for gradient in (True, False):
            triton.overwrite(triton.CROSS_ENTROPY, z, rows, States(50_257, 50_257, None), gradient)
    assert [binary.has("STG", "128") for binary in binaries] == [True, False]
    for binary in binaries:
        copies = [i for i in binary.instructions if i.startswith("LDGSTS")]
        assert copies and all("128" in i.split(".") for i in copies), binary


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_single_real_token_compiles(mode):
    """An argument of 1 is a constant to Triton, which has other methods."""
    mask_id = 1 if MODES[mode].needs_mask else None
    meta = torch.device("meta")
    ids, numbers = torch.empty(64, device=meta, dtype=torch.int64), torch.empty(64, device=meta)
    rows = Rows((ids, ids), numbers, numbers, (torch.empty(64, 8, device=meta),))
    z = torch.empty(64, 64, device=meta, dtype=torch.bfloat16)
    with ahead_of_time(H100) as binaries:
        triton.overwrite(LOSSES[mode], z, rows, States(1 + MODES[mode].needs_mask, 1, mask_id), True)
    assert len(binaries) == 1
