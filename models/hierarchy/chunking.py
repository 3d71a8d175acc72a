"""What becomes of chunks on the way back (Hwang et al. 2025, arXiv:2507.07955, equations 5 to 9).

    zbar_t = P_t z_t + (1 - P_t) zbar_{t-1};   out_t = STE(c_t) zbar_{chunk of t} + residual_t

Shapes: R rows, M places, C chunks, D width.
"""

from __future__ import annotations

from torch import Tensor

from kernels.choose import Kernels
from kernels.linear_scan import linear_scan
from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["smoothed", "straight_through"]


def smoothed(
    z: Tensor, p: Tensor, begins: Tensor | None, eps: float, kernels: Kernels, initial: Tensor | None = None
) -> Tensor:
    """z (R, C, D), p (R, C) of each chunk, begins (R, C) bool -> zbar (R, C, D), in at least fp32: a moving average
    that starts from 0 where a document begins, or from `initial` (R, D). p is kept eps away from 0 and 1."""
    exact = at_least_fp32(z.dtype)
    with own_dtypes(z.device):
        weight = p.to(exact).clamp(eps, 1 - eps)
        decay = 1 - weight
        if begins is not None:
            decay = decay.masked_fill(begins, 0.0)
        return linear_scan(weight[..., None] * z.to(exact), decay, initial, kernels=kernels)


def straight_through(c: Tensor) -> Tensor:
    """Exactly 1, with the gradient of c (Bengio et al. 2013, arXiv:1308.3432)."""
    return (c - c.detach()) + 1
