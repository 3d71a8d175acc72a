"""Changes to a predicted distribution before a token is drawn from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Shaping"]


@dataclass(frozen=True)
class Shaping:
    """Off by default, as a changed distribution is not the model's own.

    In this order: `temperature` (0: all mass on the likeliest token), the `top_k` likeliest tokens (0 is off), the
    smallest set of likeliest tokens whose mass reaches `top_p`, tokens at least `min_p` times as likely as the
    likeliest.

    `tokens`: ids below it stand for tokens; no other is ever drawn (None: all do). A model's vocabulary may be larger
    than its tokenizer's, and only training and scoring normalise over the rest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    tokens: int | None = None

    def only_tokens(self, logits: Tensor) -> Tensor:
        """Logits (M, V), -inf where an id stands for no token."""
        if self.tokens is None or self.tokens >= logits.shape[1]:
            return logits
        lacking = torch.arange(logits.shape[1], device=logits.device) >= self.tokens
        return logits.masked_fill(lacking, -torch.inf)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (M, V) -> log-probabilities (M, V) fp64."""
        logits = self.only_tokens(logits.double())
        if self.temperature == 0:
            best = logits.argmax(1, keepdim=True)
            return torch.full_like(logits, -torch.inf).scatter_(1, best, 0.0)
        if self.temperature != 1:
            # The largest becomes 0 first: however small the temperature, nothing overflows.
            logits = (logits - logits.amax(1, keepdim=True)) / self.temperature
        if 0 < self.top_k < logits.shape[1]:
            top = logits.topk(self.top_k, dim=1)  # by index: equal logits must not let more through
            logits = torch.full_like(logits, -torch.inf).scatter_(1, top.indices, top.values)
        if self.top_p < 1:
            p, order = logits.softmax(1).sort(dim=1, descending=True, stable=True)
            drop = p.cumsum(1) - p >= self.top_p  # those whose predecessors have reached it
            logits = logits.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), -torch.inf)
        if self.min_p > 0:
            p = logits.softmax(1)
            logits = logits.masked_fill(p < self.min_p * p.amax(1, keepdim=True), -torch.inf)
        return logits.log_softmax(1)
