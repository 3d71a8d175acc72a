"""The head loss: chunked against the definition, in value and in every gradient."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.linear_cross_entropy as op
from kernels import KERNELS, choose, chunks
from kernels.against import deviations
from kernels.linear_cross_entropy import IGNORED, linear_cross_entropy, reference
from kernels.softcap import SigmoidCap, TanhCap
from kernels.spec import Sample
from naming import load

ROWS, WIDTH, VOCABULARY, PADDED = 13, 6, 10, 16


def draw(dtype=torch.float64, rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator)
    weight = torch.randn(PADDED, WIDTH, dtype=torch.float64, generator=generator)
    weights = torch.rand(rows, dtype=torch.float64, generator=generator)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    targets[::4] = IGNORED
    tensors = (t.to(dtype).requires_grad_() for t in (hidden, weight, weights))
    return (*tensors, targets)


def by_hand(hidden, weight, targets, weights):
    """Row by row from the definition of the softmax."""
    total, nats = 0.0, []
    for i, target in enumerate(targets.tolist()):
        exponentials = torch.stack([(hidden[i] * weight[v]).sum().exp() for v in range(VOCABULARY)])
        nll = (
            -(exponentials[target] / exponentials.sum()).log() if target != IGNORED else hidden.new_zeros(())
        )
        nats.append(nll.detach())
        total = total + (nll if weights is None else weights[i] * nll)
    return total, torch.stack(nats)


@pytest.mark.parametrize("chunk_rows", [None, 1, 4, ROWS, 100])
@pytest.mark.parametrize("weighted", [True, False])
def test_value_and_gradients_equal_the_definition(chunk_rows, weighted):
    hidden, weight, weights, targets = draw()
    inputs = (hidden, weight, weights) if weighted else (hidden, weight)
    args = hidden, weight, targets, weights if weighted else None
    total, nats, _ = linear_cross_entropy(*args, vocab_size=VOCABULARY, chunk_rows=chunk_rows)
    expected, expected_nats = by_hand(*args)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(nats, expected_nats, rtol=0, atol=1e-12)
    assert not nats.requires_grad
    found = torch.autograd.grad(total * 0.3, inputs)
    for a, b in zip(found, torch.autograd.grad(expected * 0.3, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert not found[1][VOCABULARY:].any()


OPTIONS = {
    "tanh cap": {"softcap": TanhCap(1.3)},
    "sigmoid cap": {"softcap": SigmoidCap(3.0, 0.7, 1.2)},
    "z-loss": {"z_loss": 0.3},
    "all": {"softcap": TanhCap(2.0), "z_loss": 0.1},
}


def optioned(hidden, weight, targets, weights, softcap=None, z_loss=0.0):
    """Row by row and target by target: (sum, nats like targets, squared log-normalisers)."""
    total, nats, squares = 0.0, torch.zeros(targets.shape, dtype=hidden.dtype), []
    for i, row in enumerate(targets.view(len(hidden), -1).tolist()):
        z = [(hidden[i] * weight[v]).sum() for v in range(VOCABULARY)]
        if isinstance(softcap, TanhCap):
            z = [softcap.c * torch.tanh(x / softcap.c) for x in z]
        elif softcap is not None:
            z = [softcap.a / (1 + (-(x + softcap.b) / softcap.c).exp()) for x in z]
        log_Z = torch.stack([x.exp() for x in z]).sum().log()
        counted = [(j, target) for j, target in enumerate(row) if target != IGNORED]
        squares.append(float(log_Z.detach() ** 2) if counted else 0.0)
        for j, target in counted:
            w = weights.view(len(hidden), -1)[i, j]
            nats.view(len(hidden), -1)[i, j] = float((log_Z - z[target]).detach())
            total = total + w * (log_Z - z[target] + z_loss * log_Z**2)
    return total, nats, torch.tensor(squares, dtype=hidden.dtype)


@pytest.mark.parametrize("targets_of_row", [1, 3])
@pytest.mark.parametrize("chunk_rows", [None, 1, 7, ROWS])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_equal_their_definition(options, chunk_rows, targets_of_row):
    """Also where targets of a row coincide, and where some or all of them are ignored."""
    hidden, weight, weights, targets = draw()
    if targets_of_row > 1:
        targets = torch.stack([targets, targets.roll(1), targets.roll(1)], 1)
        targets[5] = IGNORED
        weights = torch.stack([weights, 1 - weights, 2 * weights], 1).detach().requires_grad_()
    call = hidden, weight, targets, weights, VOCABULARY, chunk_rows
    total, nats, z = linear_cross_entropy(*call, **options)
    expected, expected_nats, expected_z = optioned(hidden, weight, targets, weights, **options)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(nats, expected_nats, rtol=0, atol=1e-12)
    assert (z is None) == ("z_loss" not in options)
    if z is not None:
        torch.testing.assert_close(z, expected_z, rtol=1e-12, atol=0)
        assert not z.requires_grad
    inputs = hidden, weight, weights
    for a, b in zip(*(torch.autograd.grad(0.3 * t, inputs) for t in (total, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_of_options(options, chunk_rows):
    hidden, weight, weights, targets = draw(rows=4)
    targets, weights = torch.stack([targets, targets + 1], 1) % VOCABULARY, torch.stack([weights, weights], 1)
    weights = weights.detach().requires_grad_()
    call = lambda h, w, r: linear_cross_entropy(h, w, targets, r, VOCABULARY, chunk_rows, **options)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, (hidden, weight, weights))


def test_a_row_with_several_targets_is_as_many_rows_of_one():
    hidden, weight, _, targets = draw()
    several = torch.stack([targets, targets.roll(2)], 1)
    total, nats, _ = linear_cross_entropy(hidden, weight, several, None, VOCABULARY, 4)
    parts = [linear_cross_entropy(hidden, weight, t, None, VOCABULARY) for t in several.unbind(1)]
    torch.testing.assert_close(total, parts[0][0] + parts[1][0])
    torch.testing.assert_close(nats, torch.stack([parts[0][1], parts[1][1]], 1))


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_chosen_rows_are_all_that_is_looked_at(chunk_rows):
    """As a list of masked positions is: in any order, one of them twice, and none at all."""
    hidden, weight, weights, targets = draw()
    rows = torch.tensor([11, 2, 3, 3, 7])
    of_rows = targets[rows], weights.detach()[rows].requires_grad_()
    with torch.no_grad():
        hidden[0] = torch.nan
    total, nats, _ = linear_cross_entropy(hidden, weight, *of_rows, VOCABULARY, chunk_rows, rows=rows)
    expected, expected_nats = by_hand(hidden[rows], weight, *of_rows)
    torch.testing.assert_close(nats, expected_nats)
    inputs = hidden, weight, of_rows[1]
    for a, b in zip(*(torch.autograd.grad(t, inputs) for t in (total, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    none = torch.zeros(0, dtype=torch.int64)
    total, nats, _ = linear_cross_entropy(hidden, weight, targets[none], None, VOCABULARY, rows=none)
    assert total.item() == 0 and nats.shape == (0,)


@pytest.mark.parametrize("chunk_rows", [None, 4])
@pytest.mark.parametrize("z_loss", [0.0, 0.5])
def test_any_size_of_logits_stays_finite(chunk_rows, z_loss):
    """|z| up to 1e4 in fp32, capped and not."""
    hidden = torch.tensor([[1e4], [-1e4], [3.0]], requires_grad=True)
    weight = torch.tensor([[-1.0], [1.0], [0.5]], requires_grad=True)
    for softcap in (None, TanhCap(15.0), SigmoidCap(23.0, 5.0, 7.5)):
        args = hidden, weight, torch.tensor([0, 1, 2]), None, 3, chunk_rows
        total, nats, _ = linear_cross_entropy(*args, softcap=softcap, z_loss=z_loss)
        gradients = torch.autograd.grad(total, (hidden, weight))
        assert all(torch.isfinite(t).all() for t in (total, nats, *gradients))


# -- what is differentiated in the forward pass ------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_rows_have_no_gradient_of_their_own_and_the_sum_none_of_second_order(chunk_rows):
    hidden, weight, weights, targets = draw()
    total, nats, z = linear_cross_entropy(
        hidden, weight, targets, weights, VOCABULARY, chunk_rows, z_loss=0.1
    )
    for rows in (nats, z):
        with pytest.raises(RuntimeError, match="does not require grad"):
            torch.autograd.grad(rows.sum(), hidden, retain_graph=True)
    with (
        nullcontext()
        if chunk_rows is None
        else pytest.raises(RuntimeError, match="kernels=reference has them")
    ):
        torch.autograd.grad(total, hidden, create_graph=True)


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_an_expanded_gradient_of_the_sum(chunk_rows):
    """7 uses of the one sum, each of another size: what arrives is their total."""
    hidden, weight, weights, targets = draw()
    total, _, _ = linear_cross_entropy(hidden, weight, targets, weights, VOCABULARY, chunk_rows)
    expected = optioned(hidden, weight, targets, weights)[0]
    sizes, inputs = torch.arange(7.0, dtype=torch.float64), (hidden, weight, weights)
    found, wanted = (torch.autograd.grad(t.expand(7), inputs, sizes) for t in (total, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("which", range(8))
def test_every_combination_of_what_needs_a_gradient(which):
    """In evaluation too."""
    hidden, weight, weights, targets = draw()
    wanted = [bool(which & bit) for bit in (1, 2, 4)]
    inputs = [t.requires_grad_(need) for t, need in zip((hidden, weight, weights), wanted, strict=True)]
    args = hidden, weight, targets, weights, VOCABULARY
    total, _, _ = linear_cross_entropy(*args, 4, softcap=TanhCap(2.0), z_loss=0.1)
    plain, _, _ = linear_cross_entropy(*args, softcap=TanhCap(2.0), z_loss=0.1)
    assert total.requires_grad == any(wanted)
    torch.testing.assert_close(total, plain)
    if alive := [t for t in inputs if t.requires_grad]:
        for a, b in zip(*(torch.autograd.grad(t, alive) for t in (total, plain)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*args, 4, softcap=TanhCap(2.0), z_loss=0.1)[0], total)


@pytest.mark.parametrize("chunk_rows", [1, 5])
def test_gradcheck(chunk_rows):
    hidden, weight, weights, targets = draw()
    call = lambda h, w, r: linear_cross_entropy(h, w, targets, r, VOCABULARY, chunk_rows)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, (hidden, weight, weights))


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_padding_columns_do_not_exist(chunk_rows):
    hidden, weight, weights, targets = draw()
    before, _, _ = linear_cross_entropy(hidden, weight, targets, weights, VOCABULARY, chunk_rows)
    with torch.no_grad():
        weight[VOCABULARY:] = 1e4
    after, _, _ = linear_cross_entropy(hidden, weight, targets, weights, VOCABULARY, chunk_rows)
    assert after.item() == pytest.approx(before.item(), rel=1e-13)
    every, _, _ = linear_cross_entropy(hidden, weight, targets, weights, None, chunk_rows)
    assert every.item() > before.item() + 1


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_no_rows_and_only_ignored_rows_score_zero(chunk_rows):
    for rows in (0, 5):
        hidden, weight, weights, targets = draw(rows=rows)
        targets[:] = IGNORED
        total, nats, _ = linear_cross_entropy(hidden, weight, targets, weights, VOCABULARY, chunk_rows)
        assert total.item() == 0 and nats.shape == (rows,) and not nats.any()
        total.backward()
        assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_tied_weights_get_both_gradients(chunk_rows):
    _, weight, weights, targets = draw()
    tokens = torch.arange(ROWS) % VOCABULARY
    total, _, _ = linear_cross_entropy(weight[tokens], weight, targets, weights, VOCABULARY, chunk_rows)
    expected, _ = by_hand(weight[tokens], weight, targets, weights)
    (found,), (wanted,) = torch.autograd.grad(total, weight), torch.autograd.grad(expected, weight)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_two_uses_in_one_graph_and_a_second_backward():
    hidden, weight, weights, targets = draw()
    first, _, _ = linear_cross_entropy(hidden, weight, targets, weights, VOCABULARY, 4)
    second, _, _ = linear_cross_entropy(hidden.tanh(), weight, targets, None, VOCABULARY, 3)
    expected = (
        by_hand(hidden, weight, targets, weights)[0] + 2 * by_hand(hidden.tanh(), weight, targets, None)[0]
    )
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for _ in range(2):
        found = torch.autograd.grad(first + 2 * second, (hidden, weight), retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs_get_no_gradient(frozen):
    hidden, weight, weights, targets = draw()
    weights = weights.detach()
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    total, nats, _ = linear_cross_entropy(hidden, weight, targets, weights, VOCABULARY, 4)
    expected, expected_nats = by_hand(hidden, weight, targets, weights)
    torch.testing.assert_close(nats, expected_nats, rtol=0, atol=1e-12)
    assert total.requires_grad == (frozen != "both")
    if frozen != "both":
        alive = weight if frozen == "hidden" else hidden
        (found,), (wanted,) = torch.autograd.grad(total, alive), torch.autograd.grad(expected, alive)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [None, 100])
def test_bf16_autocast_keeps_fp32_sums_and_gradients(chunk_rows):
    hidden, weight, weights, targets = draw(torch.float32, rows=600)
    with torch.autocast("cpu", torch.bfloat16):
        total, nats, _ = linear_cross_entropy(hidden, weight, targets, weights, VOCABULARY, chunk_rows)
    assert total.dtype == nats.dtype == torch.float32
    total.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    rounded = (
        hidden.detach().bfloat16().double().requires_grad_(),
        weight.detach().bfloat16().double().requires_grad_(),
    )
    expected, _, _ = reference(*rounded, targets, weights.double(), vocab_size=VOCABULARY)
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=2e-3)
    for got, exact in zip((hidden.grad, weight.grad), (r.grad for r in rounded), strict=True):
        assert (got - exact).norm() < 0.01 * exact.norm()


def test_bf16_hidden_states_with_fp32_head():
    hidden, weight, weights, targets = draw(torch.float32)
    total, _, _ = linear_cross_entropy(hidden.bfloat16(), weight, targets, weights, VOCABULARY, 4)
    total.backward()
    assert total.dtype == weight.grad.dtype == torch.float32


def test_very_unlikely_targets_stay_finite():
    hidden, weight = torch.full((3, 1), 100.0), torch.tensor([[-5.0], [5.0]])
    targets = torch.tensor([0, 1, 0])
    for chunk_rows in (None, 2):
        total, nats, _ = linear_cross_entropy(hidden, weight, targets, None, 2, chunk_rows)
        assert nats.tolist() == [1000.0, 0.0, 1000.0] and total.item() == 2000.0


def test_the_choice_decides_the_path_and_the_budget_the_chunks(monkeypatch):
    hidden, weight, weights, targets = draw(torch.float32, rows=5)
    seen = []
    chunked = chunks.in_chunks
    monkeypatch.setattr(
        chunks, "in_chunks", lambda *args, **how: seen.append(how["chunk_rows"]) or chunked(*args, **how)
    )
    linear_cross_entropy(hidden, weight, targets, weights, VOCABULARY)
    assert seen == []
    monkeypatch.setattr(choose, "MIN_CHUNK_ROWS", 1)
    three = {"cpu": 3 * PADDED * 4, "cuda": 1}  # rows of fp32 logits
    few = replace(KERNELS[op.OP], chunk_bytes=three, plain_bytes=three)
    monkeypatch.setitem(KERNELS, op.OP, few)
    linear_cross_entropy(hidden, weight, targets, weights, VOCABULARY)
    assert seen == [3]
    plain = choose.Kernels({"default": "reference"})
    linear_cross_entropy(hidden, weight, targets, weights, VOCABULARY, kernels=plain)
    assert seen == [3] and plain.used == {op.OP: {"reference": "kernels.default"}}


class Largest(TorchDispatchMode):
    """Size of the largest tensor that anything made."""

    elements = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize(
    ("size", "rows"), [("65,536 x 768 x 50,304", 65_536), ("16,384 x 2,048 x 50,304", 16_384)]
)
def test_on_a_gpu_logits_keep_to_their_budget_and_nothing_waits_for_it(size, rows):
    """Without memory, where what asks for a value fails: forward and backward at the size of a model."""
    sample = op.SPEC.sample(op.SPEC.large[size], torch.device("meta"), torch.bfloat16, torch.Generator())
    with Largest() as most:
        (total, nats) = sample.call(load(KERNELS[op.OP].implementations["chunked"].where))
        total.backward()
    assert nats.shape == (rows,)
    # Of fp32 logits, in whole tiles of rows.
    assert 450 * 2**20 < most.bytes <= 512 * 2**20


def test_logits_of_all_rows_never_exist():
    """The largest tensor of the chunked path is far below N x V_p."""
    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(1024, 8, requires_grad=True)
    targets = torch.randint(1000, (512,))
    with Largest() as plain:
        reference(hidden, weight, targets, None, vocab_size=1000)[0].backward()
    with Largest() as chunked:
        linear_cross_entropy(hidden, weight, targets, None, 1000, 16)[0].backward()
    assert plain.elements >= 512 * 1000 and chunked.elements <= 16 * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(ROWS, WIDTH + 1)}, "expected hidden"),
        ({"targets": torch.zeros(ROWS - 1, dtype=torch.int64)}, "expected hidden"),
        ({"weights": torch.zeros(ROWS, 1)}, "expected hidden"),
        ({"vocab_size": PADDED + 1}, "1 to 16"),
        ({"vocab_size": 0}, "1 to 16"),
        ({"targets": torch.zeros(ROWS, 0, dtype=torch.int64)}, "expected hidden"),
        ({"targets": torch.zeros(ROWS, 2, dtype=torch.int64)}, "weights like targets"),
        ({"z_loss": -0.1}, r"z_loss: must be 0 \(off\) or more, got -0.1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    hidden, weight, weights, targets = draw()
    args = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "weights": weights,
        "vocab_size": VOCABULARY,
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**args, **change})


def test_the_peer_in_torch_computes_the_sum_and_only_a_peer_may_leave_out_the_rest():
    of_torch = load(op.SPEC.peers["torch"])
    size = {"rows": 20, "width": 8, "vocabulary": 33}
    sample = op.SPEC.sample(size, torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))
    if not hasattr(F, "linear_cross_entropy"):
        with pytest.raises(ImportError, match="from 2.13 on"):
            sample.call(of_torch)
        return
    assert max(deviations(of_torch, reference, sample, peer=True).values()) < 1e-6
    with pytest.raises(ValueError, match="zip"):
        deviations(of_torch, reference, sample)


def test_the_plain_path_equals_pytorch():
    hidden, weight, _, targets = draw()
    total, _, _ = linear_cross_entropy(hidden, weight, targets, None, VOCABULARY)
    logits = hidden @ weight[:VOCABULARY].T
    torch.testing.assert_close(total, F.cross_entropy(logits, targets, reduction="sum"))


def test_evaluation_computes_no_gradients(monkeypatch):
    """Under no_grad, autograd still reports that inputs need gradients."""
    products = []
    monkeypatch.setattr(chunks, "_add_product", lambda *args: products.append(args))
    hidden = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(8, 4, requires_grad=True)
    targets = torch.arange(6)
    with torch.no_grad():
        _, nats, _ = linear_cross_entropy(hidden, weight, targets, chunk_rows=2)
    assert not products and torch.isfinite(nats).all()
    linear_cross_entropy(hidden, weight, targets, chunk_rows=2)
    assert len(products) == 3


@pytest.mark.slow
@pytest.mark.parametrize("size", ["5 x 12 x 33", "plain"])
def test_compiled_equals_eager(size):
    """Without a graph break, with an operation in place behind it."""
    sample = op.SPEC.sample(
        op.SPEC.small[size], torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0)
    )
    run = load(KERNELS[op.OP].implementations["chunked"].where)

    def loss(hidden, weight):
        return (
            Sample({**sample.tensors, "hidden": hidden, "weight": weight}, sample.options)
            .call(run)[0]
            .mul_(2)
        )

    torch._dynamo.reset()
    inputs = sample.tensors["hidden"], sample.tensors["weight"]
    found, wanted = torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs), loss(*inputs)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(t, inputs) for t in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)
