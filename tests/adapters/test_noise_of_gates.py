"""Noise that gates of experts read in training is drawn once: neither recomputation nor a compiler draws it anew."""

import pytest
import torch

from tests.contract.test_run import after_steps
from tests.contract.tiny import adapter_of, batch_for, loss_and_gradients

JITTER = ("moe", "model_cfg.jitter_noise=0.1")


def test_it_is_drawn_once_where_activations_are_recomputed():
    """Whole steps, of plain descent: the gradient of a gate is that of what it read."""
    _, once = after_steps(*JITTER, "model_cfg.dropout=0.0")
    _, again = after_steps(*JITTER, "model_cfg.dropout=0.0", "gradient_checkpointing=true")
    _, without = after_steps("moe", "model_cfg.dropout=0.0")
    assert all(torch.equal(value, again[name]) for name, value in once.items())
    assert not torch.equal(once["layers.0.mlp.gate.weight"], without["layers.0.mlp.gate.weight"])


@pytest.mark.slow
def test_it_is_the_same_where_blocks_are_compiled():
    adapter = adapter_of(*JITTER)
    eager, eager_gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    for path in adapter.blocks():
        adapter.model.get_submodule(path).compile(backend="aot_eager", fullgraph=True)
    compiled, gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    assert compiled == pytest.approx(eager, rel=1e-5)
    for name, gradient in eager_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
