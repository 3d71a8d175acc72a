"""Whether the estimate of a bound is one of that bound: its mean over many draws against the same bound by other means
(`ModelAdapter.bound_otherwise`), and its standard errors against what draws scatter.

B rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from data.rows import Batch
from trainer.bench.certify.checks import Check, Path, split, tolerance

__all__ = ["WINDOWS", "agreement", "standard_errors"]

# Estimates of each window, of noise of their own: in parts, until their mean has the standard error `ENOUGH`, as a part
# of itself, or there are `MOST`.
DRAWS, MOST, ENOUGH = 256, 2048, 0.003
Z = 5.0  # standard errors: 6 in 10,000,000 by chance
WINDOWS = 2
STATED = (
    0.6,
    1.6,
)  # stated standard error as a part of what is seen, which 512 estimates tell to a tenth


def agreement(path: Path, batch: Batch) -> tuple[Check, Check]:
    """`batch`: windows of text, of which the first `bound_window` targets that count are scored, given all others."""
    batch = next(split(batch, WINDOWS))
    first = (batch.weights > 0).cumsum(1) <= path.adapter.bound_window
    batch = replace(batch, weights=np.where(first, batch.weights, 0).astype(np.float32))
    values, stated = _estimates(path, batch)
    return _means(path, batch, values), standard_errors(values, stated)


def _means(path: Path, batch: Batch, values: torch.Tensor) -> Check:
    """`values` (DRAWS, B)."""
    mean = float(values.mean(0).sum())
    error = _error(values)
    other = path.bound_otherwise(batch)
    asked = (
        f"{len(batch.rows)} windows of at most {int(batch.weights.sum(1).max())} tokens: the mean of {len(values)} "
        f"estimates meets the same bound by other means"
    )
    if other is None:
        why = f"{type(path.adapter).__name__} knows its bound by no other means (bound_otherwise)"
        return Check("bound", "failed", asked, "", f"nothing to compare with: {why}")
    asked += f": {other.how}"
    theirs, their_error = float(other.nats.sum()), float((other.errors**2).sum().sqrt())
    rounding = tolerance(path.precision, path.device) * float(batch.weights.sum())
    most = Z * math.hypot(error, their_error) + rounding
    allowed = f"{most:.3g} nats: {Z:g} standard errors of both, and the rounding of {path.precision_name}"
    found = f"{mean:.4f} +- {error:.4f} nats, and {theirs:.4f}" + (
        f" +- {their_error:.4f}" if their_error else " (nothing drawn)"
    )
    measured = {"mean": mean, "standard_error": error, "otherwise": theirs, "otherwise_error": their_error}
    passed = abs(mean - theirs) <= most
    if not passed:
        found += f": apart by {abs(mean - theirs):.3g} nats"
    return Check("bound", "passed" if passed else "failed", asked, allowed, found, measured)


def standard_errors(values: torch.Tensor, stated: torch.Tensor) -> Check:
    """Estimates and their stated variances, both (DRAWS, B) fp64."""
    seen, said = float(values.var(0).sum().sqrt()), float(stated.mean(0).sum().sqrt())
    low, high = STATED
    asked = "the standard error that estimates state is what they scatter by"
    allowed = f"{low:g} to {high:g} of it, wider than {values.numel()} estimates leave open"
    measured = {"seen": seen, "stated": said}
    found = f"one window's estimate scatters by {seen:.4f} nats, and states {said:.4f}"
    negligible = max(seen, said) <= 1e-6 * abs(float(values.mean(0).sum()))
    passed = negligible or low * seen <= said <= high * seen
    return Check("standard error", "passed" if passed else "failed", asked, allowed, found, measured)


def _estimates(path: Path, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each window R estimates and the variances that they state, both (R, B). Noise belongs to a row's number:
    copies have numbers of their own."""
    values, stated = (torch.zeros(0, len(batch.rows), dtype=torch.float64) for _ in range(2))
    while len(values) < MOST:
        nats, variance = _copies(path, batch, len(values))
        values, stated = torch.cat([values, nats]), torch.cat([stated, variance])
        if _error(values) <= ENOUGH * float(values.mean(0).sum()):
            break
    return values, stated


def _error(values: torch.Tensor) -> float:
    """Standard error of the mean of all windows together."""
    return float((values.var(0) / len(values)).sum().sqrt())


def _copies(path: Path, batch: Batch, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`DRAWS` of them from number `first` on, (DRAWS, B) fp64."""
    count = len(batch.rows)
    weights = np.tile(batch.weights, (DRAWS, 1))
    copies = Batch(
        tokens=np.tile(batch.tokens, (DRAWS, 1)),
        doc_ids=np.tile(batch.doc_ids, (DRAWS, 1)),
        weights=weights,
        end_weights=np.zeros_like(weights),
        rows=np.arange(first * count, (first + DRAWS) * count),
        bytes=0,
    )
    found = [path.score(part) for part in split(copies, path.rows_of(weights.shape[1]))]
    nats = torch.cat([part.nats for part in found])
    variance = torch.cat(
        [torch.zeros_like(part.nats) if part.variance is None else part.variance for part in found]
    )
    return nats.view(DRAWS, count), variance.view(DRAWS, count)
