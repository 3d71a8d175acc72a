"""Conditioning on a scalar: sinusoidal features, and norms whose scale, shift and gate depend on them.

Everything here is computed in at least fp32 also under autocast: it costs per row, not per token, and a scale
of 1 + s in bf16 would keep 8 bits of s.

Shapes: B rows, L positions, D width, c conditioning width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.choose import UsesKernels
from kernels.layer_norm import layer_norm
from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["AdaLN", "AdaptiveNorm", "TimeEmbedding", "gated_residual", "time_features"]

FREQUENCIES = 128
MAX_PERIOD = 10_000.0


def time_features(tau: Tensor) -> Tensor:
    """[cos(tau w_k), sin(tau w_k)], w_k = 10000^(-k / 128) for k = 0 .. 127: (...) -> (..., 256), in tau's
    dtype (the timestep embedding of Nichol and Dhariwal 2021, taken over by Peebles and Xie 2022)."""
    k = torch.arange(FREQUENCIES, dtype=tau.dtype, device=tau.device)
    angles = tau[..., None] * torch.exp(-math.log(MAX_PERIOD) / FREQUENCIES * k)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """c = SiLU(Linear(SiLU(Linear(features(tau))))): (...) -> (..., c)."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * FREQUENCIES, cond_dim)
        self.outer = nn.Linear(cond_dim, cond_dim)

    def forward(self, tau: Tensor) -> Tensor:
        with own_dtypes(tau.device):
            features = time_features(tau.to(at_least_fp32(self.inner.weight.dtype)))
            hidden = F.silu(self.inner(features.to(self.inner.weight.dtype)))
            return F.silu(self.outer(hidden))


class AdaLN(nn.Module):
    """`parts` vectors of width D from the conditioning: (..., c) -> tuple of (..., D). Starts at zero
    (adaLN-zero, Peebles and Xie 2022, section 3.2)."""

    def __init__(self, cond_dim: int, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(parts * width, cond_dim))
        self.bias = nn.Parameter(torch.empty(parts * width))

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        with own_dtypes(c.device):
            return F.linear(c, self.weight, self.bias).chunk(self.parts, dim=-1)

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class AdaptiveNorm(UsesKernels):
    """LayerNorm(x) (1 + scale) + shift; the norm has a gain and no bias. Returned in the dtype of the product
    that reads it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        stats = at_least_fp32(x.dtype)
        # Gain and scale are per row: multiplied together first, they cost one pass over x instead of two.
        gain = self.weight.to(stats) * (1 + scale.to(stats))
        return layer_norm(x, gain, shift.to(stats), self.eps, self.kernels)

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"layer_norm": {"columns": len(self.weight)}}

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch in x's dtype; gate broadcasts over positions."""
    return torch.addcmul(x, gate.to(x.dtype), branch.to(x.dtype))
