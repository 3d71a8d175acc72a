"""Output projection and cross-entropy in one op, so that logits of all rows need not exist at once.

Shapes: N rows, D width, V_p rows of the head (padded vocabulary), V real vocabulary.

`reference` is the definition, with all logits; `chunked` computes a few rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear_cross_entropy.chunked import Chunked
from kernels.linear_cross_entropy.reference import IGNORED, reference
from kernels.precision import at_least_fp32, compute_dtype

__all__ = ["IGNORED", "linear_cross_entropy", "reference"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of negative log-likelihoods of `softmax(hidden @ weight.T)`, and the value of each row.

    hidden (N, D); weight (V_p, D); targets (N,) int64, `IGNORED` rows score 0; weights (N,) or None for ones.
    Columns from `vocab_size` on (padding) take no part in the softmax. Returns `sum` (), differentiable in
    hidden, weight and weights, and `nats` (N,), unweighted and detached; both at least fp32, fp64 for fp64.
    The matrix products run in autocast's dtype where it is on.

    `chunk_rows`: rows per chunk; None = the plain path if all logits fit a budget, else chunks of that size.
    """
    _check(hidden, weight, targets, weights, vocab_size)
    vocab_size = vocab_size or weight.shape[0]
    hidden = hidden.to(compute_dtype(hidden))
    if chunk_rows is None:
        chunk_rows = _rows_within_budget(hidden, weight.shape[0])
        if chunk_rows >= hidden.shape[0]:
            return reference(hidden, weight, targets, weights, vocab_size)
    return Chunked.apply(  # type: ignore[return-value]
        hidden, weight, targets, weights, vocab_size, chunk_rows, torch.is_grad_enabled()
    )


# Bytes of logits (in the dtype of the statistics) up to which the plain path is taken, and about the size of
# a chunk beyond. On a CPU it is a matter of caches: D = 192, V = 1,025, one thread, forward and backward,
# plain : chunked: 4,096 rows (19 MB) 66 : 67 ms fp32, 33 : 39 bf16; 8,192 rows (38 MB) 185 : 134, 108 : 78;
# 16,384 rows (75 MB) 377 : 270, 278 : 160. On a GPU it is a matter of memory, and of products large enough.
LOGIT_BYTES = {"cpu": 24 * 2**20, "cuda": 256 * 2**20}
# Fewer rows make the matrix products inefficient (V = 50,257, bf16, CPU: 128 rows cost 1.3 times 512 rows).
MIN_CHUNK_ROWS = 512


def _rows_within_budget(hidden: Tensor, vocab_rows: int) -> int:
    item = at_least_fp32(hidden.dtype).itemsize
    budget = LOGIT_BYTES.get(hidden.device.type, LOGIT_BYTES["cuda"])
    return max(MIN_CHUNK_ROWS, budget // (item * vocab_rows))


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
