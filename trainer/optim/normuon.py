"""NorMuon: Muon whose orthogonalised updates are brought to one size per neuron, by a running second moment.

Li et al., "NorMuon: Making Muon more efficient and scalable" (arXiv:2510.05491), whose neurons are rows. Of wide
matrices the columns are taken, as modded-nanogpt does: rows of a wide orthogonal matrix have one length already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainer.optim.muon import Bucket, Muon, options

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["NorMuon", "normuon"]

LEAST = 1e-10  # of a second moment, and of a norm that is divided by


@dataclass
class _Bucket(Bucket):
    second_moment: Tensor = field(init=False)  # (B, m, 1) where m >= n, else (B, 1, n)

    def __post_init__(self) -> None:
        batch, rows, columns = self.momentum.shape
        self.second_moment = self.momentum.new_zeros(
            (batch, rows, 1) if rows >= columns else (batch, 1, columns)
        )

    @property
    def along(self) -> int:
        """The dimension that means are taken over."""
        return 2 if self.second_moment.shape[2] == 1 else 1

    def state(self) -> dict[str, Sequence[Tensor]]:
        return {**super().state(), "second_moment": self.split(self.second_moment)}


class NorMuon(Muon):
    """O = orth(u), m x n;  R <- b R + (1 - b) r, r the means of O^2 over rows (m >= n) or columns;  O' = O / sqrt(R),
    brought back to the norm of O;  W <- W - lr wd W - lr s O'.

    R has the precision of the momentum, is 0 at first, and is saved, and left alone in a skipped step, as it is.
    """

    bucket = _Bucket

    def __init__(self, params, lr: float, *, beta2: float = 0.95, **others: Any) -> None:
        if not 0.0 <= beta2 < 1.0:
            raise ValueError(f"normuon_beta2 must satisfy 0 <= beta2 < 1, got {beta2}")
        super().__init__(params, lr, **others)
        self._beta2 = beta2

    def adjusted(self, bucket: _Bucket, update: Tensor) -> Tensor:
        second_moment, along = bucket.second_moment, bucket.along
        update = update.to(second_moment.dtype)
        now = update.square().mean(dim=along, keepdim=True)  # (B, m, 1) or (B, 1, n)
        share = now.new_full((), 1 - self._beta2)
        if self.found_inf is not None:
            share.masked_fill_(self.found_inf > 0, 0.0)
        second_moment.lerp_(now, share)
        factor = second_moment.clamp(min=LEAST).rsqrt()
        # Squared norms, over one length: from the means, so that matrices are not read again.
        before = now.sum(dim=(1, 2), keepdim=True)
        after = (now * factor.square()).sum(dim=(1, 2), keepdim=True)
        return update * (factor * (before / after.clamp(min=LEAST)).sqrt())


def normuon(groups: list[dict[str, Any]], cfg: RunConfig) -> NorMuon:
    return NorMuon(groups, beta2=cfg.normuon_beta2, **options(cfg))
