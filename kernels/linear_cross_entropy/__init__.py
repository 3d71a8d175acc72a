"""Output projection and cross-entropy in one op, so that logits of all rows need not exist at once.

Shapes: N rows, D width, V_p rows of the head (padded vocabulary), V real vocabulary.

`reference` is the definition, with all logits; `chunked` computes a few rows at a time.
"""

from __future__ import annotations

from torch import Tensor

from kernels.choose import Kernels
from kernels.linear_cross_entropy import chunked
from kernels.linear_cross_entropy.reference import IGNORED, reference
from kernels.precision import compute_dtype

__all__ = ["IGNORED", "linear_cross_entropy", "reference"]

OP = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    kernels: Kernels | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of negative log-likelihoods of `softmax(hidden @ weight.T)`, and the value of each row.

    hidden (N, D); weight (V_p, D); targets (N,) int64, `IGNORED` rows score 0; weights (N,) or None for ones.
    Columns from `vocab_size` on (padding) take no part in the softmax. Returns `sum` (), differentiable in
    hidden, weight and weights, and `nats` (N,), unweighted and detached; both at least fp32, fp64 for fp64.
    The matrix products run in autocast's dtype where it is on.

    `kernels` of the run choose the implementation; None = automatically. `chunk_rows` given: chunks of that many.
    """
    _check(hidden, weight, targets, weights, vocab_size)
    vocab_size = vocab_size or weight.shape[0]
    hidden = hidden.to(compute_dtype(hidden))
    if chunk_rows is not None:
        return chunked.chunked(hidden, weight, targets, weights, vocab_size, chunk_rows)
    run = (kernels or Kernels()).implementation(
        OP, rows=hidden.shape[0], columns=weight.shape[0], device=hidden.device, dtype=hidden.dtype
    )
    return run(hidden, weight, targets, weights, vocab_size)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, vocab_size: int | None
) -> None:
    rows = hidden.shape[0]
    shapes_fit = hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    if not shapes_fit or targets.shape != (rows,) or (weights is not None and weights.shape != (rows,)):
        raise ValueError(
            "linear_cross_entropy: expected hidden (N, D), weight (V_p, D), targets and weights (N,); got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}, "
            f"{None if weights is None else tuple(weights.shape)}"
        )
    if vocab_size is not None and not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size: must be 1 to {weight.shape[0]} (rows of the head), got {vocab_size}")
