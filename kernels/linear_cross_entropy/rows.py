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
        log_p = z.log_softmax(1)
        counted = targets != IGNORED  # (r, k)
        index = targets.where(counted, 0)
        nats = torch.where(counted, -log_p.gather(1, index), 0.0)
        pull, aux = rows.weights.sum(1), None
        if rows.aux_weights is not None:
            lse = z.amax(1) - log_p.amax(1)
            aux = torch.where(counted.any(1), lse.square(), 0.0)
            pull = pull + 2 * rows.aux_weights * lse
        if gradient:
            # p (sum of weights + 2 aux_weight lse), less each weight at its target.
            z.copy_(log_p.exp_().mul_(pull[:, None])).scatter_add_(1, index, -rows.weights)
            if slope is not None:
                z.mul_(slope)
        return nats, aux
