"""Training in blocks from a part of (0, 1] of masking probabilities: masks within it, and which part is best.

Arriola et al. 2025 (arXiv:2503.09573), section 4.2 and appendix; kuleshov-group/bd3lms, `_resample_q_xt`.

B rows, N blocks, K numbers of masks, T times, F masked fractions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from models.bd3lm import WHOLE_FROM

__all__ = ["ClipSearch", "clipped_count"]

LOWEST_TIME = 1e-6  # where the integral of a range that begins at 0 begins


def _mask_count_law(counts: Tensor, time: Tensor, clip: tuple[float, float]) -> Tensor:
    """(..., K) probabilities, not normalised, of k = 0, ..., K - 1 masks in blocks of `counts` tokens: binomial with
    `time` (both (...), or broadcastable), drawn again until clip[0] <= k/counts <= clip[1].

    As in the released code no block is drawn again for having too few masks where the range begins at 1e-3: under a
    weight of 1/t, forcing one in would bias the loss. Where no whole number lies in the range, it is the nearest one
    above its lower end.
    """
    low = (counts * clip[0] - 1e-9).ceil() if clip[0] > WHOLE_FROM else torch.zeros_like(counts)
    high = torch.maximum((counts * clip[1] + 1e-9).floor(), low)
    most = int(counts.max()) if counts.numel() else 0
    k = torch.arange(most + 1, dtype=torch.float64)  # (K,)
    n, t = counts.unsqueeze(-1), time.unsqueeze(-1)
    allowed = (k >= low.unsqueeze(-1)) & (k <= high.unsqueeze(-1)) & (k <= n)
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp_min(0) + 1)
    log_mass = log_choose + torch.xlogy(k, t) + torch.xlogy((n - k).clamp_min(0), 1 - t)
    log_mass = log_mass.masked_fill(~allowed, -torch.inf)
    # A time of exactly 1 leaves no mass below k = n; then n is the count.
    best = log_mass.amax(-1, keepdim=True)
    return torch.where(best > -torch.inf, (log_mass - best).exp(), (k == n).double())


def clipped_count(counts: Tensor, time: Tensor, u: Tensor, clip: tuple[float, float]) -> Tensor:
    """(B, N) numbers of masks by `_mask_count_law`, from u (B, N) by inverse CDF."""
    cumulative = _mask_count_law(counts, time, clip).cumsum(-1)
    return (cumulative <= u.unsqueeze(-1) * cumulative[..., -1:]).sum(-1).double()


class ClipSearch:
    """Which of `ranges` of masking probabilities gives training's loss the least variance (section 4.2 of the paper).

    That is the variance over blocks of X = nats / (t size), the weighted loss per token, with t uniform in the range
    and masks drawn as in training. What an evaluation finds of nats given the number k of masks tells it for every
    range:

        E[X^j] = sum over k of  E_t[P(k | t, range) / t^j]  E[nats^j | k] / size^j

    `add` collects the cross-entropy per masked token by masked fraction. A table is (3, F): count, sum, sum of squares.
    """

    FRACTIONS = 20  # at most so many are told apart
    ENOUGH = 8  # blocks of each fraction
    TIMES = 256  # of the integral over t

    def __init__(
        self, size: int, ranges: Mapping[tuple[int, int], tuple[float, float]], redrawn: bool
    ) -> None:
        """`ranges`: (low, high) in twentieths -> masking probabilities. `redrawn`: masks are drawn again until their
        share lies in the range."""
        self.size, self.ranges, self.redrawn = size, ranges, redrawn
        self.table = self._empty()

    def _empty(self) -> Tensor:
        return torch.zeros(3, min(self.size, self.FRACTIONS), dtype=torch.float64)

    def take(self) -> Tensor:
        """What has been collected since the last call, (3, F) fp64."""
        table, self.table = self.table, self._empty()
        return table

    def _fraction(self, share: Tensor) -> Tensor:
        """Column of the table of a masked share in (0, 1]."""
        columns = self.table.shape[1]
        return ((share * columns - 1e-9).ceil().long() - 1).clamp(0, columns - 1)

    def add(self, masked: Tensor, counts: Tensor, nats: Tensor) -> None:
        """Blocks (B, N) with `masked` of `counts` tokens masked and a cross-entropy of `nats` over these."""
        some = masked > 0
        per_mask = nats[some] / masked[some]
        new = torch.stack([torch.ones_like(per_mask), per_mask, per_mask**2])
        self.table.index_add_(1, self._fraction(masked[some] / counts[some]), new.double())

    def best(self, table: Tensor) -> tuple[int, int] | None:
        """The range in twentieths, or None where too little has been seen."""
        if not self.ranges or bool((table[0] < self.ENOUGH).any()):
            return None
        return min(self.ranges, key=lambda name: self.variance(table, self.ranges[name]))

    def variance(self, table: Tensor, clip: tuple[float, float]) -> float:
        """Of X, in nats squared, for training in the range `clip`."""
        k = torch.arange(1, self.size + 1, dtype=torch.float64)
        _, mean, square = (table / table[0])[
            :, self._fraction(k / self.size)
        ]  # of the cross-entropy per masked token
        first, second = _weight_moments(
            self.size, clip if self.redrawn else (WHOLE_FROM, 1.0), clip, self.TIMES
        )
        share = k / self.size
        return float((second * share**2 * square).sum() - (first * share * mean).sum() ** 2)


@cache
def _weight_moments(
    size: int, clip: tuple[float, float], times: tuple[float, float], steps: int
) -> tuple[Tensor, Tensor]:
    """E_t[P(k | t) / t] and E_t[P(k | t) / t^2] for k = 1, ..., size, each (size,), with t uniform in `times` and the
    number of masks within `clip`. The midpoint rule in log t, as the weight is steep at its lower end."""
    low, high = max(times[0], LOWEST_TIME), times[1]
    log_step = math.log(high / low) / steps
    t = low * torch.exp((torch.arange(steps, dtype=torch.float64) + 0.5) * log_step)
    law = _mask_count_law(torch.full_like(t[:1], size), t, clip)
    law = law / law.sum(1, keepdim=True) * (t * log_step / (high - low)).unsqueeze(1)  # (T, K)
    return (law / t.unsqueeze(1))[:, 1:].sum(0), (law / t.unsqueeze(1) ** 2)[:, 1:].sum(0)
