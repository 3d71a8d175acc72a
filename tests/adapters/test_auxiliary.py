"""What stands beside the likelihood in training, further terms and noise, and must not reach anything else."""

import pytest
import torch

from tests.contract.test_run import after_steps
from tests.contract.tiny import adapter_of, batch_for, context, loss_and_gradients, session_of, train_on
from trainer.evaluate import evaluate

JITTER = ("moe", "model_cfg.jitter_noise=0.1")


@pytest.mark.parametrize(
    ("type_", "field", "values"),
    [
        ("moe", "alpha", (0, 1)),
        ("moe", "beta", (0, 1)),
        ("mtp", "mtp_loss_weights", ("[1,0]", "[1,1]")),
        ("mtm", "mtp_lambda", (0, 1)),
    ],
)
def test_weights_of_further_terms_do_not_reach_the_score(type_, field, values):
    """Of the same model; and a step in between shows that they reach training."""
    scores, losses = [], []
    for value in values:
        session = session_of(type_, f"model_cfg.{field}={value}", "val_tokens=96")
        rows = session.heldout(None)
        found = evaluate(session.adapter, rows, session.world, batch_rows=2, seed=0)
        scores.append((found.bits_per_byte, found.nats_per_token))
        before = session.adapter.model.embedding_weight.detach().clone()
        train_on(session, batch_for(session.adapter), range(1), 10)
        losses.append(session.adapter.model.embedding_weight.detach() - before)
    assert scores[0] == scores[1]
    assert not torch.equal(*losses)


def test_noise_of_gates_is_drawn_once_where_activations_are_recomputed():
    words = ["optimizer=sgd", "learning_rate=0.1", "model_cfg.dropout=0.0"]
    _, once = after_steps(*JITTER, *words)
    _, again = after_steps(*JITTER, *words, "gradient_checkpointing=true")
    _, without = after_steps("moe", *words)
    assert all(torch.equal(value, again[name]) for name, value in once.items())
    assert not torch.equal(once["layers.0.mlp.gate.weight"], without["layers.0.mlp.gate.weight"])


def test_noise_of_gates_is_that_of_its_step_and_rows():
    adapter = adapter_of(*JITTER)
    batch = batch_for(adapter)
    first, second, again = (
        adapter(adapter.prepare(batch, context(step=step))).terms["ce"].sum.item() for step in (0, 1, 0)
    )
    assert first == again != second
    quiet = adapter.eval().likelihood(batch, context(phase="eval")).nats
    assert torch.equal(quiet, adapter.likelihood(batch, context(step=1, phase="eval")).nats)


@pytest.mark.slow
def test_noise_of_gates_survives_compilation():
    adapter = adapter_of(*JITTER)
    eager, eager_gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    for path in adapter.blocks():
        adapter.model.get_submodule(path).compile(backend="aot_eager", fullgraph=True)
    compiled, gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    assert compiled == pytest.approx(eager, rel=1e-5)
    for name, gradient in eager_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
