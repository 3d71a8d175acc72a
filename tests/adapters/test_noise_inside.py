"""Noise that networks draw inside (of gates, of routers, of states to begin with) is drawn once: neither recomputation
nor a compiler draws it anew."""

import pytest
import torch

from tests.contract.test_run import after_steps
from tests.contract.tiny import adapter_of, batch_for, loss_and_gradients, with_dropout

# With noise, and with none or with less.
NOISY = {
    "moe": (["model_cfg.jitter_noise=0.1"], []),
    "mod": (["model_cfg.router_type=random"], []),
    "rd": ([], ["model_cfg.s0_std=0.1"]),
}
each = pytest.mark.parametrize("architecture", NOISY)


@each
def test_it_is_drawn_once_where_activations_are_recomputed(architecture):
    """Whole steps, of plain descent: what has moved is the gradient of what was read."""
    noisy, other = NOISY[architecture]
    plain = [f"{word.partition('=')[0]}=0.0" for word in with_dropout(architecture)]
    _, once = after_steps(architecture, *noisy, *plain)
    _, again = after_steps(architecture, *noisy, *plain, "gradient_checkpointing=true")
    _, without = after_steps(architecture, *other, *plain)
    assert all(torch.equal(value, again[name]) for name, value in once.items())
    assert any(not torch.equal(value, without[name]) for name, value in once.items() if name in without)


@pytest.mark.slow
@each
def test_it_is_the_same_where_blocks_are_compiled(architecture):
    """By a compiler that chooses what to keep and what to compute anew in backward."""
    adapter = adapter_of(architecture, *NOISY[architecture][0])
    eager, eager_gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    for path in adapter.blocks():
        adapter.model.get_submodule(path).compile(backend="aot_eager_decomp_partition", fullgraph=True)
    compiled, gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    assert compiled == pytest.approx(eager, rel=1e-5)
    for name, gradient in eager_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
