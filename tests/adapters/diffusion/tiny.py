"""Adapters of every process around a tiny network, and what the tests ask of them."""

import math
import types
from functools import cache

import numpy as np
import torch

from adapters.base import Context, GenerateOptions
from adapters.diffusion.bd3lm import BD3LMAdapter
from adapters.diffusion.d3pm import D3PMAdapter
from adapters.diffusion.mdl import MDLAdapter
from adapters.diffusion.sedd import SEDDAdapter
from data.rows import Batch
from models.bd3lm import BD3LM
from models.d3pm import D3PM
from models.mdl import MDL
from models.sedd import SEDD

V, S = 11, 8
TOKENIZER = types.SimpleNamespace(eot=0, ends=frozenset({0}), vocab_size=V, name="toy")
KINDS = {
    "mdl": (MDL, MDLAdapter),
    "sedd": (SEDD, SEDDAdapter),
    "d3pm": (D3PM, D3PMAdapter),
    "bd3lm": (BD3LM, BD3LMAdapter),
}
SMALL = {
    "vocab_size": V,
    "n_ctx": S,
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 1,
    "cond_dim": 8,
    "dropout": 0.0,
}
STEPS = {
    "mdl": {"num_sampling_steps": 12},
    "sedd": {"sampling_timesteps": 12},
    "d3pm": {"num_timesteps": 12, "sampling_timesteps": 12},
    "bd3lm": {"num_sampling_steps": 12, "block_length": 4},
}


def build(kind, trained=True, **fields):
    model_class, adapter_class = KINDS[kind]
    cfg = model_class.Config(**{**SMALL, **STEPS[kind], "nelbo_draws": 4, **fields})
    adapter = adapter_class(model_class(cfg), cfg, TOKENIZER)
    adapter.init_weights(torch.Generator().manual_seed(0))
    adapter.double()
    if trained:  # a network that answers something
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapter.named_parameters():
            if not bool(parameter.any()) or "adaln" in name:
                parameter.data.normal_(0, 0.3, generator=generator)
    return adapter.eval()


def batch(ids, seq_len=S, doc_starts=()):
    """Rows by id; a document begins at each of `doc_starts`."""
    tokens = np.stack([np.random.default_rng(i).integers(1, V, seq_len + 1) for i in ids])
    doc_ids = np.zeros_like(tokens, dtype=np.int32)
    for start in doc_starts:
        doc_ids[:, start:] += 1
    ones = np.ones((len(ids), seq_len), dtype=np.float32)
    return Batch(tokens, doc_ids, ones, np.zeros_like(ones), np.asarray(ids), len(ids) * seq_len)


def train_context(rows_in_step=4, step=0):
    return Context(seed=1, step=step, phase="train", rows_in_step=rows_in_step)


EVAL = Context(seed=1, step=0, phase="eval", rows_in_step=4)


def objective(adapter, batches, rows_in_step=4):
    """Loss and gradients of a step made of several micro-batches, as the trainer adds them up."""
    adapter.zero_grad()
    prepared = [adapter.prepare(b, train_context(rows_in_step)) for b in batches]
    totals = {k: sum(p.denominators[k] for p in prepared) for k in prepared[0].denominators}
    value = 0.0
    for p in prepared:
        out = adapter(p)
        loss = sum(term.weight * term.sum / totals[term.denominator] for term in out.terms.values())
        loss.backward()
        value += loss.item()
    return value, [p.grad.clone() for p in adapter.parameters() if p.grad is not None]


@cache
def _fingerprint(kind, fields):
    adapter = build(kind, **dict(fields))
    value, gradients = objective(adapter, [batch([0, 1, 2, 3])])
    assert math.isfinite(value) and all(bool(g.isfinite().all()) for g in gradients)
    bound = adapter.likelihood(batch([0, 1]), EVAL)
    assert all(
        bool(v.isfinite().all()) for v in [bound.nats, *bound.parts.values(), *bound.estimates.values()]
    )
    options = GenerateOptions(max_new_tokens=8, temperature=1.0, stop_at_document_end=False)
    text = adapter.generate([[1, 2, 3], [4, 5, 6]] * 4, options)
    return {
        "loss": value,
        "gradient": float(sum(g.abs().sum() for g in gradients)),
        "bound": float(bound.nats.sum()),
        "paper": float(bound.estimates["paper"].sum()),
        "estimator": bound.estimator,
        "text": text.tokens,
        "calls": text.network_calls,
    }


def fingerprint(kind, **fields):
    """What a configuration does: a training step, a bound, a text over two windows. Kept, as many tests compare with
    the same base."""
    return _fingerprint(kind, tuple(sorted(fields.items())))


def assert_changes(kind, base, change, what):
    """Whatever `what` is of a configuration, `change` changes it."""
    assert fingerprint(kind, **base)[what] != fingerprint(kind, **{**base, **change})[what]
