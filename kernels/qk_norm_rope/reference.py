"""The definition of normalised, rotated queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.rms_norm.reference import reference as rms_norm

__all__ = ["reference"]


def reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, h), k (B, T, G, h), cos and sin (T, 1, r/2) or (B, T, 1, r/2), weights (h,) -> q and k like them;
    rotated in the dtype of the tables."""
    if q_weight is not None:
        _, q = rms_norm(q, None, q_weight, eps=eps, out_dtype=q.dtype)
    if k_weight is not None:
        _, k = rms_norm(k, None, k_weight, eps=eps, out_dtype=k.dtype)
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Each pair a, b of the first r dims of x (B, T, heads, h), by its angle: a cos - b sin, b cos + a sin."""
    turning, rest = x.tensor_split((2 * cos.shape[-1],), dim=-1)
    turning = turning.to(cos.dtype)
    # As a whole: halves of the dims, or every second, take a CPU half as long again, or twice as long.
    if interleaved:
        other = turning.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    else:
        other = turning.roll(cos.shape[-1], dims=-1)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    turned = (turning * cos + other * sin).to(x.dtype)  # other: b, a
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
