"""Cross-entropy of a few rows at a time (kernels/chunks.py)."""

from __future__ import annotations

from torch import Tensor

from kernels.choose import rows_at_once
from kernels.chunks import States, differentiable
from kernels.linear_cross_entropy.reference import weighed
from kernels.linear_cross_entropy.rows import CrossEntropy
from kernels.softcap import Softcap

__all__ = ["chunked"]


def chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    *,
    vocab_size: int,
    softcap: Softcap | None = None,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments and results as `reference`; `chunk_rows` None = as many as the table allows."""
    rows = weighed(hidden, targets, weights, z_loss)
    chunk_rows = chunk_rows or rows_at_once(
        "linear_cross_entropy", weight.shape[0], hidden.device, rows.weights.dtype
    )
    states = States(vocab_size, vocab_size, None)
    total, nats, z = differentiable(CrossEntropy(softcap), states, hidden, weight, None, rows, chunk_rows)
    return total, nats.view_as(targets), z if z_loss else None
