"""Gradients of a few rows are computed while their logits exist, in the forward pass; the backward only scales them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.choose import rows_at_once
from kernels.chunks import refuse_second_order, scaled
from kernels.linear_function_loss.reference import RowFunction, weighed
from kernels.precision import at_least_fp32

__all__ = ["chunked"]


def chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    weights: Tensor,
    function: RowFunction,
    *,
    V: int,
    aux_weight: float = 0.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments and results as `reference`; `chunk_rows` None = as many as the table allows."""
    chunk_rows = chunk_rows or rows_at_once(
        "linear_function_loss", V, hidden.device, at_least_fp32(hidden.dtype)
    )
    return _Chunked.apply(hidden, weight, bias, weights, function, V, aux_weight, chunk_rows)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        weights: Tensor,
        function: RowFunction,
        V: int,
        aux_weight: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        needed = ctx.needs_input_grad[:3]
        stats = at_least_fp32(hidden.dtype)
        # Chunks add up in full precision: a sum of thousands of bf16 terms would stop growing.
        grads = [
            torch.zeros(t.shape, dtype=torch.promote_types(t.dtype, stats), device=t.device) if n else None
            for t, n in zip((hidden, weight, bias), needed, strict=True)
        ]
        total = torch.zeros((), dtype=stats, device=hidden.device)
        nats, ce = [hidden.new_empty(0, dtype=stats)], []
        for start in range(0, max(1, len(hidden)), chunk_rows):  # no rows: one empty chunk, for its results
            rows = slice(start, min(start + chunk_rows, len(hidden)))
            with torch.enable_grad():
                h, w, b = (
                    t.detach().requires_grad_(n)
                    for t, n in zip((hidden[rows], weight, bias), needed, strict=True)
                )
                part, row_nats, row_ce = weighed(h, w, b, weights[rows], function, rows, V, aux_weight)
            if any(needed):
                found = iter(torch.autograd.grad(part, [t for t in (h, w, b) if t.requires_grad]))
                for i, grad in enumerate(grads):
                    if grad is not None:
                        (grad[rows] if i == 0 else grad).add_(next(found))
            total += part.detach()
            nats.append(row_nats.detach())
            if row_ce is not None:
                ce.append(row_ce.detach())
        ctx.save_for_backward(*grads)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        all_nats, all_ce = torch.cat(nats), torch.cat(ce) if ce else None
        ctx.mark_non_differentiable(*(t for t in (all_nats, all_ce) if t is not None))
        return total, all_nats, all_ce

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        found = (scaled(g, grad_sum, t) for g, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *found, *(None,) * 5
