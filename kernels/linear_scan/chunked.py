"""The recurrence by products of chunks of steps, with its gradient by formula: what is left at step i of what came in
at step j is a product of the decays between, taken as such. No logarithm: a decay may be 0, and nothing is subtracted.

Shapes: B rows, K chunks of Q steps, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["before", "chunked"]

CHUNK = 32  # 16 to 64 take as long, 128 five times (1 x 1,024 x 192, one thread)


def chunked(x: Tensor, decay: Tensor, initial: Tensor | None) -> Tensor:
    """Arguments and result as `reference`."""
    exact = at_least_fp32(x.dtype)
    start = x.new_zeros(x.shape[0], x.shape[2], dtype=exact) if initial is None else initial.to(exact)
    with own_dtypes(x.device):
        return _Chunks.apply(x, decay.to(exact), start)


class _Chunks(torch.autograd.Function):
    """x (B, T, D), decay (B, T), initial (B, D) -> y like x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor, initial: Tensor) -> Tensor:
        y = _scan(x.to(decay.dtype), decay, initial)
        ctx.save_for_backward(decay, initial, y)
        ctx.dtype = x.dtype
        return y.clone() if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, initial, y = ctx.saved_tensors
        (dy,) = gradients
        with own_dtypes(dy.device):
            # What is behind a step reaches it through the next one's decay.
            later = F.pad(decay[:, 1:], (0, 1)).flip(1)
            dx = _scan(dy.to(decay.dtype).flip(1), later, torch.zeros_like(initial)).flip(1)
            ddecay = (dx * before(y, initial)).sum(-1)
            return dx.to(ctx.dtype), ddecay, decay[:, :1] * dx[:, 0]


def before(y: Tensor, initial: Tensor) -> Tensor:
    """y (B, T, D), initial (B, D) -> of every step what y was before it."""
    return torch.cat((initial[:, None].to(y.dtype), y[:, :-1]), dim=1)


def _scan(x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """x (B, T, D), decay (B, T), state (B, D), of one dtype -> y (B, T, D)."""
    steps = x.shape[1]
    length = min(CHUNK, steps)
    x, decay = _cut(x, length), _cut(decay, length)
    shape = *decay.shape, length  # (B, K, Q, Q): from step j (row) to step i (column)
    within = torch.where(_later(length, x.device), decay[:, :, None, :].expand(shape), 1).cumprod(-1).triu()
    y = within.mT @ x
    since = decay.cumprod(-1)[..., None]  # (B, K, Q, 1)
    entering = []
    for added, left in zip(y[:, :, -1].unbind(1), since[:, :, -1].unbind(1), strict=True):
        entering.append(state)
        state = torch.addcmul(added, left, state)
    y = torch.addcmul(y, since, torch.stack(entering, dim=1)[:, :, None])
    return y.flatten(1, 2)[:, :steps]


def _later(length: int, device: torch.device) -> Tensor:
    """(Q, Q): whether step i (column) comes behind step j (row)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def _cut(t: Tensor, length: int) -> Tensor:
    """(B, T, ...) -> (B, K, Q, ...), the last chunk filled up with zeros."""
    if missing := -t.shape[1] % length:
        t = torch.cat((t, t.new_zeros(len(t), missing, *t.shape[2:])), dim=1)
    return t.unflatten(1, (t.shape[1] // length, length))
