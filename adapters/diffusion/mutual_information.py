"""Schedules that lose information about the text at a constant rate (Austin et al. 2021, appendix A.7).

For a chain Qbar = exp(abar R), `r(abar) = 1 - I(x_t; x_0)/H(x_0)` rises from 0 to 1. It is tabulated, and the exponents
are those with r(abar_t) = t/(T+1), as in the authors' code: the paper's t/T is reached by no finite exponent at t = T,
and the prior term of the bound accounts for the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["exponents", "lost_information_spectral", "lost_information_uniform"]

TABLE_SIZE = 256
SMALLEST, LARGEST = 1e-4, 1e5


def _entropy(p: Tensor) -> float:
    return float(-torch.xlogy(p, p).sum())


def lost_information_uniform(unigram: Tensor, exponent: float) -> float:
    """r for R = 11'/K - 1, in closed form: (H(x0, xt) - H(xt)) / H(x0)."""
    p, k = unigram.double(), len(unigram)
    a = float(np.exp(-exponent))
    own, other = a + (1 - a) / k, (1 - a) / k
    joint = _entropy(p * own) + (k - 1) * _entropy(p * other)
    return (joint - _entropy(a * p + (1 - a) / k)) / _entropy(p)


def lost_information_spectral(unigram: Tensor, values: Tensor, vectors: Tensor) -> Callable[[float], float]:
    """r for a symmetric R = U diag(values) U'."""
    p = unigram.double()

    def lost(exponent: float) -> float:
        q = ((vectors * torch.exp(exponent * values)) @ vectors.T).clamp_min(0)
        q = q / q.sum(1, keepdim=True)
        joint = p.unsqueeze(1) * q
        return (_entropy(joint) - _entropy(joint.sum(0))) / _entropy(p)

    return lost


def exponents(lost: Callable[[float], float], steps: int) -> Tensor:
    """(T+1,) cumulative exponents abar_0 = 0 < ... < abar_T with lost(abar_t) = t/(T+1)."""
    grid = np.geomspace(SMALLEST, LARGEST, TABLE_SIZE)
    levels = np.maximum.accumulate([lost(float(e)) for e in grid])
    # At the far end rounding makes it flat; keep the strictly rising part, from (0, 0) on.
    keep = np.concatenate([[True], np.diff(levels) > 1e-12])
    x = np.concatenate([[0.0], levels[keep]])
    y = np.concatenate([[0.0], grid[keep]])
    wanted = np.arange(1, steps + 1) / (steps + 1)
    if wanted[-1] > x[-1]:
        raise ValueError(
            f"mutual_info schedule: noise of exponent {LARGEST:g} destroys only {x[-1]:.4f} of the information, and "
            f"{wanted[-1]:.4f} is asked for. Use more nearest_neighbors or fewer num_timesteps"
        )
    return torch.from_numpy(np.concatenate([[0.0], _monotone_cubic(x, y, wanted)]))


def _monotone_cubic(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Fritsch-Carlson interpolation (PCHIP) through rising points."""
    h, d = np.diff(x), np.diff(y) / np.diff(x)
    w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    inner = (w1 + w2) / (w1 / d[:-1] + w2 / d[1:])  # weighted harmonic mean; all slopes are positive
    slope = np.concatenate([[d[0]], inner, [d[-1]]])
    i = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    s = (at - x[i]) / h[i]
    return (
        y[i] * (1 + 2 * s) * (1 - s) ** 2
        + slope[i] * h[i] * s * (1 - s) ** 2
        + y[i + 1] * s**2 * (3 - 2 * s)
        + slope[i + 1] * h[i] * s**2 * (s - 1)
    )
