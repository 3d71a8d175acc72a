"""The definition of the Newton-Schulz iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.newton_schulz.coefficients import COEFFICIENTS, Coefficients

__all__ = ["divisors", "reference"]


def reference(matrices: Tensor, *, coefficients: str, steps: int, dtype: torch.dtype) -> Tensor:
    """(B, m, n) -> (B, m, n) in `dtype`, that of all products."""
    chosen = COEFFICIENTS[coefficients]
    x = (matrices / divisors(matrices, chosen)).to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for a, b, c in chosen.polynomials(steps):
        gram = x @ x.mT  # (B, s, s), s = min(m, n)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def divisors(matrices: Tensor, chosen: Coefficients) -> Tensor:
    """(B, m, n) -> (B, 1, 1): what brings every singular value into [0, 1]."""
    norms = matrices.flatten(1).norm(dim=1)[:, None, None]  # bounds the largest singular value
    return chosen.margin * norms + chosen.epsilon
