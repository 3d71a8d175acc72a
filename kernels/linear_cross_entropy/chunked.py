"""Logits, loss AND gradients of a few rows at a time in the forward pass; the backward only scales what is stored.

The same three matrix products as the plain path, and memory for one chunk, N x D and V_p x D instead of N x V_p (the
idea of Liger-Kernel, Hsu et al. 2024, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.choose import rows_at_once
from kernels.linear_cross_entropy.reference import IGNORED
from kernels.precision import at_least_fp32

__all__ = ["Chunked", "chunked"]


def chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    vocab_size: int,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `reference`; `chunk_rows` None = as many as the table allows."""
    chunk_rows = chunk_rows or rows_at_once(
        "linear_cross_entropy", weight.shape[0], hidden.device, hidden.dtype
    )
    return Chunked.apply(  # type: ignore[return-value]
        hidden, weight, targets, weights, vocab_size, chunk_rows, torch.is_grad_enabled()
    )


class Chunked(torch.autograd.Function):
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
