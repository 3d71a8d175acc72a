"""Types from outside whose scores are better than they should be; see test_certify.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from adapters.default import DefaultModelAdapter
from models.gpt2 import GPT2


class Ahead(GPT2):
    """Sees a little of the token after the next one."""

    def forward(self, tokens, **more):
        hidden = super().forward(tokens, **more)
        return hidden + 0.1 * F.pad(self.wte(tokens)[:, 2:], (0, 0, 0, 2))[:, : tokens.shape[1]]


class Own(GPT2):
    """Sees the very token that it is asked for."""

    def forward(self, tokens, **more):
        hidden = super().forward(tokens, **more)
        return hidden + F.pad(self.wte(tokens)[:, 1:], (0, 0, 0, 1))


class Generous(DefaultModelAdapter):
    """Gives every token a fifth more than there is to give."""

    def likelihood(self, batch, ctx):
        found = super().likelihood(batch, ctx)
        weights = torch.from_numpy(batch.weights).double()
        each = found.per_token - np.log(1.2)
        return replace(found, per_token=each, nats=(each * weights).sum(1))


class Lazy(DefaultModelAdapter):
    """Scores the first tokens of a row alone."""

    def likelihood(self, batch, ctx):
        found = super().likelihood(batch, ctx)
        each = found.per_token * (torch.arange(found.per_token.shape[1]) < 8)
        return replace(found, per_token=each, nats=(each * torch.from_numpy(batch.weights)).sum(1))


class TwoBytes(DefaultModelAdapter):
    """Holds every token for two bytes."""

    def __init__(self, model, model_cfg, tokenizer):
        super().__init__(model, model_cfg, tokenizer)
        tokenizer.token_bytes = 2 * (tokenizer.token_bytes > 0)


class Sociable(DefaultModelAdapter):
    """What it says of a row depends on the rows beside it."""

    def likelihood(self, batch, ctx):
        found = super().likelihood(batch, ctx)
        return replace(found, nats=found.nats * (1 + 0.001 * len(batch.rows)), per_token=None)


class Fickle(DefaultModelAdapter):
    """Says something else at every call."""

    calls = 0

    def likelihood(self, batch, ctx):
        found = super().likelihood(batch, ctx)
        self.calls += 1
        return replace(found, nats=found.nats * (1 + 1e-4 * self.calls), per_token=None)


class NonCausal(DefaultModelAdapter):
    """Says of itself that choices see later tokens."""

    non_causal_routing = True


class Honest(DefaultModelAdapter):
    """Nothing is wrong with it."""
