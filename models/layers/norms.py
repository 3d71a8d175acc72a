"""Normalisation over the last axis: statistics in at least fp32, result in the dtype of the next product.

    y = norm(x)
    x, y = norm(x, branch)  # of x + branch, the residual stream: one pass where a kernel adds and normalises

Under autocast the residual stream is fp32. Handing the result over in autocast's dtype lets the several
projections that read it share one conversion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.choose import UsesKernels
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.rms_norm import add_rms_norm, rms_norm

__all__ = ["LayerNorm", "RMSNorm"]


class RMSNorm(UsesKernels):
    """x / sqrt(mean(x^2) + eps) * gain (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if branch is None:
            return rms_norm(x, self.weight, self.eps, self.kernels)
        return add_rms_norm(x, branch, self.weight, self.eps, self.kernels)

    def stream(self, x: Tensor, branch: Tensor | None = None) -> Tensor:
        """The norm of x (+ branch) where that is the residual stream itself: in x's own dtype."""
        if branch is None:
            return rms_norm(x, self.weight, self.eps, self.kernels, x.dtype)
        return add_rms_norm(x, branch, self.weight, self.eps, self.kernels, x.dtype)[1]

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"rms_norm": {"columns": len(self.weight)}}

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)


class LayerNorm(UsesKernels):
    """(x - mean) / sqrt(var + eps) * gain + bias, biased variance (Ba et al. 2016, equation 4)."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if branch is None:
            return layer_norm(x, self.weight, self.bias, self.eps, self.kernels)
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps, self.kernels)

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"layer_norm": {"columns": len(self.weight)}}

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
