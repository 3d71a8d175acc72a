"""The definition of the head loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.chunks import Rows
from kernels.precision import at_least_fp32
from kernels.softcap import Softcap

__all__ = ["IGNORED", "reference", "weighed"]

IGNORED = -100  # a target of this value scores 0 and gives no gradient


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    *,
    vocab_size: int,
    softcap: Softcap | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition, with all logits in memory. Arguments and results as `linear_cross_entropy`."""
    rows = weighed(hidden, targets, weights, z_loss)
    (index,) = rows.ids
    logits = F.linear(hidden, weight[:vocab_size].to(hidden.dtype))  # (N, V)
    logits = logits.to(at_least_fp32(logits.dtype))
    if softcap is not None:
        logits = softcap(logits)
    log_p = logits.log_softmax(1)
    counted = index != IGNORED  # (N, k)
    nats = torch.where(counted, -log_p.gather(1, index.where(counted, 0)), 0.0)
    total = (rows.weights * nats).sum()
    if rows.aux_weights is None:
        return total, nats.detach().view_as(targets), None
    z = torch.where(counted.any(1), logits.logsumexp(1).square(), 0.0)
    return total + (rows.aux_weights * z).sum(), nats.detach().view_as(targets), z.detach()


def weighed(hidden: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float) -> Rows:
    """`targets` and `weights` (N,) or (N, k) as rows of k targets: weights are 0 where a target is `IGNORED`, and a
    row's square of log Z weighs `z_loss` times their sum. Both are differentiable in `weights`."""
    dtype = at_least_fp32(hidden.dtype)
    index = targets if targets.ndim == 2 else targets[:, None]  # (N, k)
    row_weights = (index != IGNORED).to(dtype)
    if weights is not None:
        row_weights = row_weights * weights.view_as(index).to(dtype)
    return Rows((index,), row_weights, z_loss * row_weights.sum(1) if z_loss else None)
