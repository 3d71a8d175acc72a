"""Noise of layers."""

import pytest
import torch
from torch._dynamo.utils import counters

from models.layers.hashing import LayerNoise, hashed_uniform
from tests.contract.tiny import adapter_of, batch_for, loss_and_gradients


def test_a_layer_has_a_stream_of_its_own_also_of_a_part():
    seeds = torch.tensor([3, 4])
    noise = LayerNoise(5)
    assert torch.equal(noise(seeds, 20), hashed_uniform(seeds, 5, 20))
    assert torch.equal(noise(seeds, 8, first=12), noise(seeds, 20)[:, 12:])
    assert not noise.state_dict(), "checkpoints know nothing of it"
    noise.to_empty(device="cpu").init_weights()
    assert torch.equal(noise(seeds, 20), hashed_uniform(seeds, 5, 20))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("moe", ["model_cfg.jitter_noise=0.1"]),
        ("mod", ["model_cfg.router_type=random", "model_cfg.every_other=false"]),
    ],
)
def test_ten_layers_with_noise_are_compiled_once(architecture, words):
    """Not once for each, as the ninth would run uncompiled."""
    adapter = adapter_of(architecture, "model_cfg.n_layers=10", *words)
    torch._dynamo.reset()
    counters.clear()
    for path in adapter.blocks():
        adapter.model.get_submodule(path).compile(backend="aot_eager", fullgraph=True)
    loss_and_gradients(adapter, [batch_for(adapter)])
    assert counters["stats"]["unique_graphs"] == 1
