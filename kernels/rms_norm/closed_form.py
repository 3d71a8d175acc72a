"""RMSNorm with its gradient by formula: on a CPU half of the passes over memory that torch's own, a composition there,
takes (4,096 x 192, one thread, forward and backward: 8.2 to 4.6 ms from fp32 to bf16, 6.7 to 3.4 in fp32).

Shapes: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["closed_form"]


def closed_form(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, *, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Arguments and results as `reference`."""
    total = x if branch is None else x + branch
    stats = at_least_fp32(total.dtype)
    gain = None if weight is None else weight.to(stats)
    with own_dtypes(total.device):
        y = _Norm.apply(total.to(stats).reshape(-1, total.shape[-1]), gain, eps, out_dtype)
    return (None if branch is None else total), y.view(total.shape)


class _Norm(torch.autograd.Function):
    """y = g u, u = r x, r = 1 / sqrt(mean(x^2) + eps); dx = r (g dy - u mean(g dy u)), dg = sum of dy u over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # (N, 1)
        r = length.square_().div_(x.shape[1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, r)
        y = x * r
        return (y if gain is None else y.mul_(gain)).to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, r = ctx.saved_tensors
        dy = gradients[0].to(r.dtype)
        u = x * r
        pulls = dy * u  # (N, D)
        if gain is None:
            mean, dgain = pulls.mean(1, keepdim=True), None
            dx = torch.addcmul(dy, u, mean, value=-1)
        else:
            mean, dgain = (pulls @ gain)[:, None].div_(x.shape[1]), pulls.sum(0)
            dx = torch.mul(dy, gain, out=pulls).addcmul_(u, mean, value=-1)
        return dx.mul_(r), dgain, None, None
