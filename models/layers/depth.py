"""How often a recurrent core runs in a training step: a heavy-tailed law of depths.

Shapes: N draws, Z nodes of the integral over the log-normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["DepthLaw"]

NEVER = 1e-7  # probability of what no run meets
NODES = np.linspace(-8.0, 8.0, 513)  # in standard deviations: the trapezoid rule is exact here to rounding


@dataclass(frozen=True)
class DepthLaw:
    """r = 1 + Poisson(e^tau), tau ~ N(log mean - variance / 2, variance), no more than `cap` (Geiping et al. 2025,
    section 3.3): without a cap of mean `mean` + 1, whatever the variance."""

    mean: float
    variance: float
    cap: int | None = None

    def draw(self, u: Tensor) -> Tensor:
        """u (N, 2) fp64 in (0, 1) -> r (N,) int64, by inversion of both distributions."""
        rate = self._rate(torch.special.ndtri(u[:, 0]).numpy())
        return torch.from_numpy(self._capped(1 + _poisson(rate, u[:, 1].numpy())))

    def expected(self, most: int | None = None) -> float:
        """E[min(r, most)]; None: E[r]."""
        bounds = [bound for bound in (most, self.cap) if bound is not None]
        return float(self.beyond(min(bounds)).sum()) if bounds else self.mean + 1.0

    def typical(self, retained: int) -> int:
        """The depth at which a step costs most nearly what steps cost on average, if the last `retained` iterations are
        propagated back through, at twice the cost of running them."""
        cost = self.expected() + 2 * self.expected(retained)
        return max(1, round(cost / 3 if cost <= 3 * retained else cost - 2 * retained))

    def deepest(self, most: int) -> int:
        """The largest depth up to `most` that a run may meet."""
        bound = most if self.cap is None else min(most, self.cap)
        return max(1, int((self.beyond(bound) > NEVER).sum()))

    def beyond(self, count: int) -> np.ndarray:
        """P(r > j) for j = 0, 1, ..., `count` - 1, without a cap; it ends where that is as good as 0."""
        rate = self._rate(NODES)  # (Z,)
        weights = np.exp(-(NODES**2) / 2)
        weights /= weights.sum()
        left, found = np.ones_like(rate), [1.0]  # of P(N >= j | rate), N = r - 1
        for j in range(1, count):
            left = left - _probability(j - 1, rate)
            found.append(float(weights @ left))
            if found[-1] < NEVER**2:
                break
        return np.array(found[:count])

    def _rate(self, normal: np.ndarray) -> np.ndarray:
        sigma = math.sqrt(self.variance)
        return self.mean * np.exp(sigma * normal - self.variance / 2)

    def _capped(self, r: np.ndarray) -> np.ndarray:
        return r if self.cap is None else np.minimum(r, self.cap)


def _probability(n: int, rate: np.ndarray) -> np.ndarray:
    """Of n by Poisson's law."""
    return np.exp(n * np.log(rate) - rate - math.lgamma(n + 1))


def _poisson(rate: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The smallest n whose cumulative probability reaches u, for each of (N,) pairs."""
    n = np.zeros(len(rate), dtype=np.int64)
    total = np.zeros_like(rate)
    # Where rounding keeps the sum of all probabilities below u, a bound far beyond the rate ends it.
    bound = np.ceil(rate + 20 * np.sqrt(rate) + 50)
    short, k = np.arange(len(rate)), 0
    while len(short):
        total[short] += _probability(k, rate[short])
        short = short[(u[short] > total[short]) & (k < bound[short])]
        n[short] = k = k + 1
    return n
