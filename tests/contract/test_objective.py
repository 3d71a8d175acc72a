"""Loss, gradients, invariance, causality, likelihood."""

import importlib
import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from kernels import KERNELS, TRITON
from kernels.choose import Call, Kernels
from models import ARCHITECTURES
from tests.contract.tiny import (
    SEQ_LEN,
    adapter_of,
    batch_for,
    batch_of,
    context,
    device,
    is_exact,
    loss_and_gradients,
    move_away_from_uniform,
    split,
)
from tests.kernels.interpret import interpreted


def test_forward_and_backward_are_finite_and_reach_every_parameter(architecture):
    adapter = adapter_of(architecture)
    losses, gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    assert all(math.isfinite(v) for v in losses.values())
    assert set(gradients) == {n for n, p in adapter.named_model_parameters() if p.requires_grad}
    assert all(torch.isfinite(g).all() for g in gradients.values())


def test_first_score_is_that_of_a_uniform_guess(architecture):
    adapter = adapter_of(architecture).eval()
    if adapter.external() or adapter.model_cfg.elsewhere:
        pytest.skip("it begins with weights that were trained elsewhere")
    nats = adapter.likelihood(batch_for(adapter, rows=32), context(32, phase="eval")).nats
    assert abs(float(nats.mean()) / SEQ_LEN - math.log(adapter.tokenizer.vocab_size)) < 0.3


def test_accuracy_on_marks_is_what_the_logits_say(architecture):
    """Of next-token models, and of marked targets alone; others report none, which evaluations tell."""
    adapter = adapter_of(architecture).eval()
    with torch.no_grad():
        move_away_from_uniform(adapter)
    batch, ctx = batch_for(adapter, rows=12), context(12, phase="eval")
    marked = np.random.default_rng(1).random(batch.weights.shape) < 0.5
    batch.marked["odd"] = marked
    found = adapter.likelihood(batch, ctx).metrics.get("odd_accuracy")
    assert (found is not None) == is_exact(adapter)
    if found is None:
        return
    with torch.no_grad():
        likeliest = adapter.logits(adapter.clean_states(batch, ctx)).argmax(-1).cpu().numpy()
    # The last target is no input of a position that is scored: it can be made what the model says.
    batch.tokens[:, 1 : marked.shape[1] + 1][:, -1] = likeliest[:, -1]
    found = adapter.likelihood(batch, ctx).metrics["odd_accuracy"]
    right = (likeliest == batch.tokens[:, 1 : marked.shape[1] + 1]) & marked
    assert (float(found.sum), float(found.count)) == (right.sum(), marked.sum())
    assert 0 < right.sum() < marked.sum()


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1], [2, 2]])
def test_splitting_a_batch_changes_no_loss_and_no_gradient(architecture, sizes):
    adapter = adapter_of(architecture, dtype=torch.float64)
    assert not adapter.depends_on_split, "an option may declare it; what a file says by default may not"
    batch = batch_for(adapter)
    batch.weights[1, 5:] = 0  # uneven denominators: means of means would differ
    whole, whole_gradients = loss_and_gradients(adapter, [batch])
    parts, part_gradients = loss_and_gradients(adapter, split(batch, sizes))
    assert parts == pytest.approx(whole, rel=1e-9)
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(part_gradients[name], gradient, rtol=1e-7, atol=1e-12, msg=name)


def test_rows_are_independent(architecture):
    adapter = adapter_of(architecture, dtype=torch.float64).eval()
    batch = batch_for(adapter)
    together = adapter.likelihood(batch, context(phase="eval")).nats
    alone = torch.cat(
        [adapter.likelihood(part, context(phase="eval")).nats for part in split(batch, [1] * 4)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def nats_by_position(adapter, tokens):
    """(S,) nats of each position of one row, (1, S + n), by scoring one position at a time."""
    batch = batch_of(np.repeat(tokens, SEQ_LEN, axis=0), tokens.shape[1] - SEQ_LEN)
    batch.weights[:] = np.eye(SEQ_LEN, dtype=np.float32)
    return adapter.likelihood(batch, context(SEQ_LEN, phase="eval")).nats


def test_a_later_token_changes_nothing_earlier(architecture):
    adapter = adapter_of(architecture, dtype=torch.float64).eval()
    tokens = batch_for(adapter, rows=1).tokens
    if not is_exact(adapter):
        pytest.skip("a bound has no order of positions; what it may see is tested with its objective")
    before = nats_by_position(adapter, tokens)
    whole = adapter.likelihood(batch_of(tokens, tokens.shape[1] - SEQ_LEN), context(1, phase="eval"))
    if whole.per_token is not None:
        torch.testing.assert_close(whole.per_token[0], before, rtol=1e-9, atol=1e-12)
    for place in (1, 7, SEQ_LEN - 1):
        changed = tokens.copy()
        changed[0, place] = (changed[0, place] + 1) % adapter.tokenizer.eot
        after = nats_by_position(adapter, changed)
        torch.testing.assert_close(after[: place - 1], before[: place - 1], rtol=0, atol=1e-12)
        assert not torch.allclose(after[place - 1 :], before[place - 1 :])


def test_documents_in_a_row_do_not_see_each_other(architecture):
    adapter = adapter_of(architecture, dtype=torch.float64).eval()
    batch = batch_for(adapter, rows=2)
    batch.tokens[1, SEQ_LEN // 2 :] = batch.tokens[0, SEQ_LEN // 2 :]  # same second document, other first
    batch.tokens[:, SEQ_LEN // 2] = adapter.tokenizer.eot
    batch.doc_ids[:, SEQ_LEN // 2 :] = 1
    batch.weights[:, : SEQ_LEN // 2] = 0
    batch.rows[:] = 0  # the same noise, where there is any
    nats = adapter.likelihood(batch, context(phase="eval")).nats
    torch.testing.assert_close(nats[0], nats[1], rtol=1e-12, atol=0)


def test_likelihood_sums_to_one_over_all_texts(architecture):
    """By brute force over texts of four symbols out of three, or of one byte; a bound may only leave probability
    over."""
    adapter = adapter_of(architecture, vocabulary=3, dtype=torch.float64)
    move_away_from_uniform(adapter)
    eot, n = adapter.tokenizer.eot, adapter.data_spec().lookahead
    texts = np.array(list(itertools.product(range(eot + 1), repeat=4 if eot == 2 else 1)))
    tokens = np.pad(texts, ((0, 0), (1, n - 1)), constant_values=eot)
    found = adapter.eval().likelihood(batch_of(tokens, n), context(len(texts), phase="eval"))
    total = float(torch.exp(-found.nats).sum())
    if found.kind == "exact":
        assert total == pytest.approx(1.0, abs=1e-9)
        assert found.nats.std() > 0.1
    else:
        assert total < 1.05


def test_every_implementation_of_the_kernels_gives_the_same(architecture, monkeypatch):
    adapter = adapter_of(architecture, "kernels=reference", dtype=torch.float64)
    ops = adapter.kernel_calls(4, SEQ_LEN)
    plain, plain_gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    assert {op: [*used] for op, used in adapter.kernels.used.items()} == {op: ["reference"] for op in ops}
    for op in ops:
        for name, way in KERNELS[op].implementations.items():
            if Kernels().lacking(op, name, Call(adapter.device, torch.float64, **ops[op])):
                continue
            if hasattr(module := importlib.import_module(way.where.partition(":")[0]), "rows_at_once"):
                monkeypatch.setattr(module, "rows_at_once", lambda *args: 5)
            adapter.kernels = Kernels({op: name})
            other, gradients = loss_and_gradients(adapter, [batch_for(adapter)])
            assert [*adapter.kernels.used[op]] == [name]
            assert other == pytest.approx(plain, rel=1e-10)
            for path, gradient in plain_gradients.items():
                torch.testing.assert_close(gradients[path], gradient, rtol=1e-8, atol=1e-12, msg=path)


@pytest.mark.slow
def test_the_triton_kernels_give_the_same(architecture):
    """All that the architecture calls, in fp32; on a CPU in the interpreter."""
    adapter = adapter_of(architecture, "kernels=reference")
    plain, plain_gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    ops = [op for op in adapter.kernels.used if TRITON in KERNELS[op].implementations]
    if not ops:  # those of the table have a head loss, if nothing else
        (pytest.fail if architecture in ARCHITECTURES else pytest.skip)("no operation with a Triton kernel")
    with interpreted() if device().type == "cpu" else nullcontext():
        adapter.kernels = Kernels(dict.fromkeys(ops, TRITON))
        other, gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    assert all([*adapter.kernels.used[op]] == [TRITON] for op in ops)
    assert other == pytest.approx(plain, rel=1e-5)
    largest = max(gradient.abs().max() for gradient in plain_gradients.values())
    for path, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[path], gradient, rtol=1e-3, atol=1e-5 * float(largest), msg=path)
