"""Normalisation over the last axis: statistics in at least fp32, result in the dtype of the next product.

Under autocast the residual stream is fp32. Handing the result over in autocast's dtype lets the several
projections that read it share one conversion.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.choose import UsesKernels
from kernels.precision import at_least_fp32, compute_dtype
from kernels.rms_norm import rms_norm

__all__ = ["LayerNorm", "RMSNorm"]


class RMSNorm(UsesKernels):
    """x / sqrt(mean(x^2) + eps) * gain (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.kernels)

    def kernel_calls(self) -> dict[str, dict[str, Any]]:
        return {"rms_norm": {"columns": len(self.weight)}}

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * gain + bias, biased variance (Ba et al. 2016, equation 4)."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        stats = at_least_fp32(x.dtype)
        bias = None if self.bias is None else self.bias.to(stats)
        y = F.layer_norm(x.to(stats), self.weight.shape, self.weight.to(stats), bias, self.eps)
        return y.to(compute_dtype(x))

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
