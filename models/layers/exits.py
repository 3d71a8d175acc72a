"""When a token has been through enough recurrences (Geiping et al. 2025, arXiv:2502.05171, section 6).

What a recurrence gives of a token is compared with what the one before gave: its state, or the law of what comes next
that the coda makes of the state. Where these have all but stopped changing, the token leaves.

Shapes: ... tokens in any arrangement, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["CRITERIA", "Criterion", "Watch", "state_change"]

MIN_P = 0.1  # of `minp-kl`: tokens less likely than so many times the likeliest are all alike


class Watch(Protocol):
    """Of tokens that are on their way."""

    def settled(self, now: Tensor) -> Tensor:
        """(...,) bool: which tokens may leave, given what one more recurrence made of them: states (..., D), or logits
        (..., V)."""

    def select(self, rows: Tensor) -> None:
        """Go on with these of the tokens' rows, (R,) int64."""


class _Change:
    """Leave once the change from one recurrence to the next is less than a threshold."""

    def __init__(
        self, of: Callable[[Tensor], Tensor], change: Measure, start: Tensor, threshold: float
    ) -> None:
        self.of, self.change, self.threshold = of, change, threshold
        self.before = self.of(_precise(start))

    def settled(self, now: Tensor) -> Tensor:
        before, self.before = self.before, self.of(_precise(now))
        return self.change(before, self.before) < self.threshold

    def select(self, rows: Tensor) -> None:
        self.before = self.before[rows]


class _Stability:
    """Leave once the likeliest token has been the same one in so many recurrences in a row."""

    def __init__(self, start: Tensor, threshold: float) -> None:
        self.threshold = threshold
        self.best = torch.full(start.shape[:-1], -1, device=start.device)  # no token's
        self.equal = torch.zeros_like(self.best)

    def settled(self, now: Tensor) -> Tensor:
        best = now.argmax(-1)
        self.equal = torch.where(best == self.best, self.equal + 1, 1)
        self.best = best
        return self.equal >= self.threshold

    def select(self, rows: Tensor) -> None:
        self.best, self.equal = self.best[rows], self.equal[rows]


Measure = Callable[[Tensor, Tensor], Tensor]  # before, now -> (...,)


@dataclass(frozen=True)
class Criterion:
    """`threshold`: the published one. `of_laws`: whether it is asked of logits, and not of states. `watch(start,
    threshold)`: `start` are the states before the first recurrence, or zeros like the logits: a uniform law."""

    threshold: float
    of_laws: bool
    watch: Callable[[Tensor, float], Watch]


def _changing(threshold: float, of_laws: bool, of: Callable[[Tensor], Tensor], change: Measure) -> Criterion:
    return Criterion(threshold, of_laws, lambda start, threshold: _Change(of, change, start, threshold))


def _precise(x: Tensor) -> Tensor:
    return x.to(at_least_fp32(x.dtype))


# -- what is compared --------------------------------------------------------------------------------------------------


def _state(state: Tensor) -> Tensor:
    return state


def _log_law(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


def _log_law_of_likely(logits: Tensor) -> Tensor:
    """The law with 1 / V in place of what is less likely than `MIN_P` times the likeliest, made to sum to 1."""
    law = logits.softmax(-1)
    unlikely = law < MIN_P * law.amax(-1, keepdim=True)
    law = law.masked_fill(unlikely, 1 / law.shape[-1])
    return (law / law.sum(-1, keepdim=True)).log()


def _entropy(logits: Tensor) -> Tensor:
    law = logits.log_softmax(-1)
    return -(law.exp() * law).sum(-1)


# -- and how -----------------------------------------------------------------------------------------------------------


def state_change(before: Tensor, now: Tensor) -> Tensor:
    """||s_i - s_{i-1}|| / ||s_i||, (..., D) -> (...,)"""
    return torch.linalg.vector_norm(now - before, dim=-1) / torch.linalg.vector_norm(now, dim=-1)


def _angle(before: Tensor, now: Tensor) -> Tensor:
    """1 - cos(s_i, s_{i-1})"""
    return 1 - torch.cosine_similarity(before, now, dim=-1)


def _divergence(before: Tensor, now: Tensor) -> Tensor:
    """KL(before || now) of logarithms of laws."""
    return (before.exp() * (before - now)).sum(-1)


def _difference(before: Tensor, now: Tensor) -> Tensor:
    return (now - before).abs()


CRITERIA = {
    "kl": _changing(1e-3, True, _log_law, _divergence),
    "latent-diff": _changing(0.03, False, _state, state_change),
    "entropy-diff": _changing(1e-3, True, _entropy, _difference),
    "cosine": _changing(1e-3, False, _state, _angle),
    "argmax-stability": Criterion(5, True, _Stability),
    "minp-kl": _changing(1e-5, True, _log_law_of_likely, _divergence),
}
