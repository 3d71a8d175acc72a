"""Real training of real models: does the bound come down to the true entropy, and stop there?"""

import math
import types

import numpy as np
import pytest
import torch

from adapters.base import Context
from data.markov import MarkovSource
from data.rows import Batch
from tests.adapters.test_diffusion_adapter import KINDS

SYMBOLS, S = 32, 64
TOKENIZER = types.SimpleNamespace(eot=SYMBOLS, vocab_size=SYMBOLS + 1, name="markov")
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


def train(adapter, batch_of, steps, rate):
    """AdamW with warm-up and a linear fall; an average of the weights over the last fifth."""
    parameters = list(adapter.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 50, 1.05 - s / steps)
    )
    adapter.train()
    for step in range(steps):
        batch = batch_of(step)
        prepared = adapter.prepare(
            batch, Context(seed=0, step=step, phase="train", rows_in_step=len(batch.rows))
        )
        out = adapter(prepared)
        loss = sum(t.weight * t.sum / prepared.denominators[t.denominator] for t in out.terms.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return adapter.eval()


def bound(adapter, batch, draws=None):
    """(nats per token, standard error)."""
    found = adapter.likelihood(batch, Context(seed=0, step=0, phase="eval", rows_in_step=len(batch.rows)))
    count = float(batch.weights.sum())
    return float(found.nats.sum()) / count, math.sqrt(float(found.variance.sum())) / count


@pytest.mark.slow
@pytest.mark.parametrize("kind, steps", [("mdl", 300), ("sedd", 400)])
def test_a_handful_of_rows_is_learned_by_heart(kind, steps):
    """With reverse-time noise a memorised text costs next to nothing."""
    rows = as_rows(np.random.default_rng(0).integers(0, SYMBOLS, (8, S)))
    adapter = train(adapter_of(kind), lambda step: rows, steps * 3, 4e-3)
    value, error = bound(adapter, rows)
    assert value - 3 * error < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, fields, limit",
    [
        ("mdl", {}, 1.10),
        ("sedd", {}, 1.10),
        ("d3pm", {"num_timesteps": 500}, 1.10),
        ("bd3lm", {"block_length": 4}, 1.10),
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
    train(
        adapter, lambda step: as_rows(training[order.integers(0, len(training), 32)], step * 32), 1500, 4e-3
    )
    value, error = bound(adapter, as_rows(heldout))
    print(f"{kind}: bound {value:.4f} +- {error:.4f}, true model {true:.4f}")
    assert error < 0.02 * true
    assert value > true - 3 * error
    assert value < limit * true
