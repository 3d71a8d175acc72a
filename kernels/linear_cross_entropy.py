"""Output projection and cross-entropy in one op, so that logits of all rows need not exist at once.

Shapes: N rows, D width, V_p rows of the head (padded vocabulary), V real vocabulary.

`reference` is the definition. The chunked path computes logits, loss AND gradients of a few rows at a time
in the forward pass; the backward only scales what is stored. It needs the same three matrix products as the
plain path and memory for one chunk, N x D and V_p x D instead of N x V_p (the idea of Liger-Kernel, Hsu et
al. 2024, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.precision import at_least_fp32, compute_dtype

__all__ = ["IGNORED", "linear_cross_entropy", "reference"]

IGNORED = -100  # a target of this value scores 0 and gives no gradient


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
    return _Chunked.apply(  # type: ignore[return-value]
        hidden, weight, targets, weights, vocab_size, chunk_rows, torch.is_grad_enabled()
    )


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The definition, with all logits in memory. Arguments and results as `linear_cross_entropy`."""
    logits = F.linear(hidden, weight[:vocab_size].to(hidden.dtype))  # (N, V)
    logits = logits.to(at_least_fp32(logits.dtype))
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")  # (N,)
    total = nats.sum() if weights is None else (nats * weights.to(nats.dtype)).sum()
    return total, nats.detach()


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


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        vocab_size: int,
        chunk_rows: int,
        with_gradients: bool,  # `needs_input_grad` is True under no_grad too, where the gradients would be wasted
    ) -> tuple[Tensor, Tensor]:
        stats = at_least_fp32(hidden.dtype)
        head = weight.to(hidden.dtype)  # once, not once per chunk
        row_weights = None if weights is None else weights.to(stats)
        needs_hidden, needs_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        nats = torch.empty(hidden.shape[0], dtype=stats, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Chunks add up in full precision: a sum of thousands of bf16 terms would stop growing.
        grad_weight = torch.zeros(weight.shape, dtype=stats, device=weight.device) if needs_weight else None

        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            log_p = _log_probabilities(hidden[rows], head, vocab_size, stats)  # (n, V_p)
            valid = targets[rows] != IGNORED  # (n,)
            index = targets[rows].where(valid, 0).unsqueeze(1)  # (n, 1)
            nats[rows] = torch.where(valid, -log_p.gather(1, index).squeeze(1), 0.0)
            if not (needs_hidden or needs_weight):
                continue
            # d sum / d logits = w (softmax - onehot), in place of the log-probabilities.
            slope = valid.to(stats) if row_weights is None else row_weights[rows] * valid
            grad = log_p.exp_()
            grad.scatter_add_(1, index, grad.new_full((1, 1), -1.0).expand_as(index))
            grad = grad.mul_(slope.unsqueeze(1)).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[rows])

        ctx.save_for_backward(grad_hidden, grad_weight, nats if ctx.needs_input_grad[3] else None)
        ctx.dtypes = weight.dtype, None if weights is None else weights.dtype
        ctx.mark_non_differentiable(nats)
        return (nats if row_weights is None else nats * row_weights).sum(), nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, nats = ctx.saved_tensors
        weight_dtype, weights_dtype = ctx.dtypes
        return (
            # (1, 1) instead of (): the factor is not rounded to bf16 before it is applied.
            None if grad_hidden is None else (grad_hidden * grad_sum.view(1, 1)).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_sum).to(weight_dtype),
            None,
            None if nats is None else (nats * grad_sum).to(weights_dtype),
            None,
            None,
            None,
        )


def _log_probabilities(hidden: Tensor, head: Tensor, vocab_size: int, stats: torch.dtype) -> Tensor:
    """(n, V_p) in `stats`; -inf in the padding. All V_p columns are multiplied: a round number of them."""
    logits = torch.mm(hidden, head.T)
    logits[:, vocab_size:] = -torch.inf
    return torch.log_softmax(logits, 1, dtype=stats)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the precision of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


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
