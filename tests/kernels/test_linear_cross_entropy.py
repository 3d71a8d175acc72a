"""The head loss: chunked against the definition, in value and in every gradient."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import kernels.linear_cross_entropy as op
from kernels import KERNELS, choose, chunks
from kernels.linear_cross_entropy import IGNORED, linear_cross_entropy, reference

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
    few = replace(KERNELS[op.OP], chunk_bytes={"cpu": 3 * PADDED * 4, "cuda": 1})  # three rows of fp32 logits
    monkeypatch.setitem(KERNELS, op.OP, few)
    linear_cross_entropy(hidden, weight, targets, weights, VOCABULARY)
    assert seen == [3]
    plain = choose.Kernels({"default": "reference"})
    linear_cross_entropy(hidden, weight, targets, weights, VOCABULARY, kernels=plain)
    assert seen == [3] and plain.used == {op.OP: {"reference": "kernels.default"}}


def test_logits_of_all_rows_never_exist():
    """The largest tensor of the chunked path is far below N x V_p."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

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
