"""The row step of cross-entropy, in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.chunks import Rows, States
from kernels.linear_cross_entropy.reference import IGNORED
from kernels.softcap import Softcap

__all__ = ["CrossEntropy"]


@dataclass(frozen=True)
class CrossEntropy:
    """-log softmax(cap(z)) at k targets of a row, `ids` = (targets (r, k),), weights (r, k): 0 where a target is
    `IGNORED`, of which `weights` must be 0. aux: lse(cap(z))^2, 0 where all targets of a row are ignored."""

    softcap: Softcap | None = None

    def rows(self, z: Tensor, rows: Rows, states: States, gradient: bool) -> tuple[Tensor, Tensor | None]:
        (targets,) = rows.ids
        slope = None
        if self.softcap is not None:
            z.copy_(self.softcap(z))
            slope = self.softcap.slope(z) if gradient else None
        lse = z.logsumexp(1)  # (r,)
        counted = targets != IGNORED  # (r, k)
        index = targets.where(counted, 0)
        nats = torch.where(counted, lse[:, None] - z.gather(1, index), 0.0)
        aux = None if rows.aux_weights is None else torch.where(counted.any(1), lse.square(), 0.0)
        if gradient:
            # p (sum of weights + 2 aux_weight lse), less each weight at its target.
            pull = rows.weights.sum(1)
            if rows.aux_weights is not None:
                pull = pull + 2 * rows.aux_weights * lse
            z.sub_(lse[:, None]).exp_().mul_(pull[:, None]).scatter_add_(1, index, -rows.weights)
            if slope is not None:
                z.mul_(slope)
        return nats, aux
