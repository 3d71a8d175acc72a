"""Output projection and cross-entropy in one op, so that logits of all rows need not exist at once.

Shapes: N rows, k targets of each, D width, V_p rows of the head (padded vocabulary), V real vocabulary.

`reference` is the definition, with all logits; `chunked` computes a few rows at a time, and so does `triton`,
where one kernel does what follows the product.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from kernels.choose import SPARING, Kernels
from kernels.linear_cross_entropy import chunked
from kernels.linear_cross_entropy.reference import IGNORED, reference
from kernels.linear_cross_entropy.sizes import SPEC
from kernels.precision import compute_dtype
from kernels.softcap import Softcap

__all__ = ["IGNORED", "SPEC", "linear_cross_entropy", "reference"]

OP = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    kernels: Kernels | None = None,
    *,
    rows: Tensor | None = None,
    softcap: Softcap | None = None,
    z_loss: float = 0.0,
    sparing: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weighted sum of negative log-likelihoods of `softmax(softcap(hidden @ weight.T))`, and the value of each row.

    hidden (N, D), or more rows than N, of which `rows` (N,) int64 are chosen first, so that the others cost nothing;
    weight (V_p, D); targets (N,), or (N, k) for k tokens predicted by the same logits, int64, of which
    `IGNORED` ones score 0; weights like targets, or None for ones. Columns from `vocab_size` on (padding) take no part
    in the softmax. A scale of each column is the caller's to multiply the head's rows by.

    Returns `sum` (), of weight * (nats + z_loss * z), differentiable in hidden, weight and weights; `nats` like
    targets, and `z` (N,), the square of a row's log-normaliser (0 where all its targets are ignored; None without
    `z_loss`), both unweighted and detached. All are at least fp32, fp64 for fp64; the matrix products run in autocast's
    dtype where it is on.

    `sparing`: no logits are kept until the backward, so that of several heads in a graph those of one exist at a time.

    `kernels` of the run choose the implementation; None = automatically. `chunk_rows` given: chunks of that many.
    ValueError on shapes that do not fit.
    """
    if rows is not None:
        hidden = hidden.index_select(0, rows)
    _check(hidden, weight, targets, weights, vocab_size, z_loss)
    hidden = hidden.to(compute_dtype(hidden))
    args = hidden, weight, targets, weights
    kind: dict[str, Any] = {
        "vocab_size": vocab_size or weight.shape[0],
        "softcap": softcap,
        "z_loss": z_loss,
    }
    if chunk_rows is not None:
        return chunked.chunked(*args, **kind, chunk_rows=chunk_rows)
    run = (kernels or Kernels()).implementation(
        OP,
        rows=hidden.shape[0],
        columns=weight.shape[0],
        device=hidden.device,
        dtype=hidden.dtype,
        facts=(SPARING,) if sparing else (),
    )
    if sparing and run is reference:  # the others have their gradients before the forward ends
        return recompute(run, *args, **kind, use_reentrant=False, preserve_rng_state=False)
    return run(*args, **kind)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    vocab_size: int | None,
    z_loss: float,
) -> None:
    shapes_fit = hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    rows_fit = targets.ndim in (1, 2) and targets.shape[0] == hidden.shape[0] and 0 not in targets.shape[1:]
    if not shapes_fit or not rows_fit or (weights is not None and weights.shape != targets.shape):
        raise ValueError(
            "linear_cross_entropy: expected hidden (N, D), weight (V_p, D), targets (N,) or (N, k), weights like "
            f"targets; got {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}, "
            f"{None if weights is None else tuple(weights.shape)}"
        )
    if vocab_size is not None and not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size: must be 1 to {weight.shape[0]} (rows of the head), got {vocab_size}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss: must be 0 (off) or more, got {z_loss}")
