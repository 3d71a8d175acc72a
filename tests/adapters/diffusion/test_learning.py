"""Real training of real models: does the bound come down to the true entropy, and stop there?"""

import math
import types

import numpy as np
import pytest
import torch

from adapters.base import Context
from configs.schema import RunConfig
from data.markov import MarkovSource
from data.rows import Batch
from tests.adapters.diffusion.tiny import KINDS
from trainer.optim.optimizers import build_optimizers, clip_gradients

SYMBOLS, S = 32, 64
TOKENIZER = types.SimpleNamespace(
    eot=SYMBOLS, ends=frozenset({SYMBOLS}), vocab_size=SYMBOLS + 1, name="markov"
)
SIZES = {
    "vocab_size": SYMBOLS + 1,
    "n_ctx": S,
    "d_model": 64,
    "n_heads": 2,
    "n_layers": 2,
    "cond_dim": 32,
    "dropout": 0.0,
}


def adapter_of(kind, **fields):
    model_class, adapter_class = KINDS[kind]
    cfg = model_class.Config(**{**SIZES, "nelbo_draws": 8, **fields})
    adapter = adapter_class(model_class(cfg), cfg, TOKENIZER)
    adapter.init_weights(torch.Generator().manual_seed(0))
    return adapter


def as_rows(tokens, first=0):
    """(B, S) tokens, each row a document of its own behind its start token."""
    tokens = np.concatenate([np.full((len(tokens), 1), TOKENIZER.eot), tokens], axis=1).astype(np.int64)
    ones = np.ones((len(tokens), S), dtype=np.float32)
    ids = np.arange(first, first + len(tokens))
    return Batch(tokens, np.zeros_like(tokens, dtype=np.int32), ones, np.zeros_like(ones), ids, tokens.size)


def train(adapter, batch_of, steps):
    """The shipped optimizers, with a linear fall at the end."""
    cfg = RunConfig(
        type="diffusion", optimizer="muon", learning_rate=1e-3, weight_decay=0.0, lr_scaling="none"
    )
    optimizers = build_optimizers(adapter.named_model_parameters(), adapter.param_roles(), cfg, adapter.width)
    parameters, moved = list(adapter.parameters()), torch.zeros(())
    adapter.train()
    for step in range(steps):
        batch = batch_of(step)
        ctx = Context(seed=0, step=step, phase="train", rows_in_step=len(batch.rows))
        prepared = adapter.prepare(batch, ctx)
        out = adapter(prepared)
        sum(t.weight * t.sum / prepared.denominators[t.denominator] for t in out.terms.values()).backward()
        clip_gradients(parameters, 1.0)
        optimizers.step(min(1.0, (step + 1) / 20, 2.5 * (1 - step / steps)), moved)
        optimizers.zero_grad()
    return adapter.eval()


def bound(adapter, batch):
    """(nats per token, standard error)."""
    found = adapter.likelihood(batch, Context(seed=0, step=0, phase="eval", rows_in_step=len(batch.rows)))
    count = float(batch.weights.sum())
    return float(found.nats.sum()) / count, math.sqrt(float(found.variance.sum())) / count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mdl", "sedd"])
def test_a_handful_of_rows_is_learned_by_heart(kind):
    """Naming one of eight texts costs ln 8 nats, 0.03 a token; the rest is known then."""
    rows = np.random.default_rng(0).integers(0, SYMBOLS, (8, S))
    adapter = adapter_of(kind, d_model=128, nelbo_draws=32)
    train(adapter, lambda step: as_rows(np.tile(rows, (4, 1)), step * 32), 1600)
    value, error = bound(adapter, as_rows(np.tile(rows, (8, 1))))
    print(f"{kind}: bound {value:.4f} +- {error:.4f} of 8 texts by heart")
    assert value + error < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, fields, limit",
    [
        ("mdl", {}, 1.05),
        ("sedd", {}, 1.05),
        ("d3pm", {"num_timesteps": 500}, 1.05),
        ("bd3lm", {"block_length": 4}, 1.05),
    ],
)
def test_the_bound_reaches_the_entropy_of_markov_text_and_not_less(kind, fields, limit):
    source = MarkovSource(SYMBOLS, 1)
    lookup = np.zeros(256, dtype=np.int64)
    lookup[source.alphabet] = np.arange(SYMBOLS)

    def text(documents, stream):
        return lookup[
            np.stack([np.frombuffer(d, dtype=np.uint8)[: S * 31] for d in source.sample(documents, stream)])
        ]

    training = text(400, 0).reshape(-1, S)
    heldout = text(12, 1).reshape(-1, S)
    raw = [bytes(source.alphabet[row].tolist()) for row in heldout]
    true = sum(source.nats(r) for r in raw) / heldout.size
    adapter = adapter_of(kind, **fields)
    order = np.random.default_rng(3)
    train(adapter, lambda step: as_rows(training[order.integers(0, len(training), 32)], step * 32), 1000)
    value, error = bound(adapter, as_rows(heldout))
    print(f"{kind}: bound {value:.4f} +- {error:.4f}, true model {true:.4f}")
    assert error < 0.02 * true
    assert value > true - 3 * error
    assert value < limit * true
