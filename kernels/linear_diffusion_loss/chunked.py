"""A chunk's logits, losses AND gradients are computed in the forward pass, where the weight of every row is known; the
backward only scales what is stored (the idea of Liger-Kernel, Hsu et al. 2024, arXiv:2410.10989, section 3.2, for the
losses of discrete diffusion).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.choose import rows_at_once
from kernels.linear_diffusion_loss.reference import product_dtype
from kernels.linear_diffusion_loss.rows import MODES, Chunk, States
from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["Chunked", "chunked"]

# Rows of low-precision products. Their number is drawn anew in every step, and the library compiles and keeps a product
# for each shape it meets: a megabyte a step at first.
ROW_MULTIPLE = 64
COLUMN_MULTIPLE = 64  # of low-precision copies of the head: odd numbers of columns make products slow


def chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x0: Tensor,
    xt: Tensor,
    weights: Tensor,
    coefficients: Mapping[str, Tensor],
    *,
    mode: str,
    V: int,
    n: int,
    mask_id: int | None,
    aux_weight: float | Tensor = 0.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments and results as `reference`; `chunk_rows` None = as many as the table allows."""
    stats, dtype = at_least_fp32(hidden.dtype), product_dtype(hidden)
    with torch.no_grad():
        prepared = MODES[mode].prepare(x0, xt, coefficients, States(V, n, mask_id))
        scalars = tuple(s.to(stats) for s in prepared)
        weights = weights.to(stats)
        aux_weights: Tensor | None = None
        if isinstance(aux_weight, Tensor):
            aux_weights = aux_weight.to(stats)
        elif aux_weight != 0:
            aux_weights = aux_weight * weights
    gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    rows = chunk_rows or rows_at_once("linear_diffusion_loss", V, hidden.device, dtype)
    sizes = (mode, V, n, mask_id, rows, gradient)
    with own_dtypes(hidden.device):
        total, nats, aux = Chunked.apply(
            hidden.to(dtype), weight, bias, x0, xt, weights, aux_weights, *sizes, *scalars
        )
    return total, nats, None if aux_weights is None else aux


class Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x0: Tensor,
        xt: Tensor,
        weights: Tensor,
        aux_weights: Tensor | None,
        mode: str,
        V: int,
        n: int,
        mask_id: int | None,
        chunk_rows: int,
        gradient: bool,
        *scalars: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        stats, states = weights.dtype, States(V, n, mask_id)
        head = _Head(weight, bias, hidden.dtype, stats)
        nats = torch.empty_like(weights)
        aux = torch.empty_like(weights if aux_weights is not None else weights[:0])
        grads = _Gradients(hidden, head) if gradient else None
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            chunk = Chunk(
                x0[rows],
                xt[rows],
                weights[rows],
                None if aux_weights is None else aux_weights[rows],
                tuple(s[rows] for s in scalars),
            )
            part, count = hidden[rows], len(chunk.x0)
            if head.narrow:
                part = F.pad(part, (0, 0, 0, -count % ROW_MULTIPLE))
            z = head.logits(part)  # (r, V_p), rows behind `count` are padding
            nats[rows], ce = MODES[mode].rows(z[:count, :V], chunk, states, gradient)
            if ce is not None:
                aux[rows] = ce
            if grads is not None:
                z[:, V:] = 0
                z[count:] = 0
                grads.add(rows, z, part, head)
        if grads is not None:
            grad_weight = grads.weight[: weight.shape[0]]
            ctx.save_for_backward(
                grads.hidden, grad_weight, None if bias is None else grads.bias[: bias.shape[0]]
            )
            ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nats, aux)
        total = (weights * nats).sum()
        if aux_weights is not None:
            total = total + (aux_weights * aux).sum()
        return total, nats, aux

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            (grad * grad_sum).to(dtype) if needed and grad is not None else None
            for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return (*scaled, *[None] * (len(ctx.needs_input_grad) - 3))


class _Head:
    """The output layer, converted once for all chunks: `weight` (V_p, D) in the dtype of products, padded if
    that takes a copy anyway; `bias` (V_p,) in the dtype of statistics, or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, stats: torch.dtype) -> None:
        rows = weight.shape[0]
        self.weight, self.stats = weight.detach(), stats
        self.narrow = dtype != stats
        if weight.dtype != dtype:
            rows = -(-rows // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
            self.weight = weight.new_zeros(rows, weight.shape[1], dtype=dtype)
            self.weight[: weight.shape[0]] = weight.detach()
        self.bias = None
        if bias is not None:
            self.bias = bias.new_zeros(rows, dtype=stats)
            self.bias[: bias.shape[0]] = bias.detach()

    def logits(self, hidden: Tensor) -> Tensor:
        """(r, D) -> (r, V_p) in the dtype of statistics, the caller's to overwrite."""
        if self.bias is not None and hidden.dtype == self.stats:
            return torch.addmm(self.bias, hidden, self.weight.T)
        z = torch.mm(hidden, self.weight.T).to(self.stats)
        return z if self.bias is None else z.add_(self.bias)


class _Gradients:
    """Sums over chunks, in the dtype of statistics: a sum of thousands of bf16 terms would stop growing."""

    def __init__(self, hidden: Tensor, head: _Head) -> None:
        self.hidden = torch.empty_like(hidden)
        self.weight = head.weight.new_zeros(head.weight.shape, dtype=head.stats)
        self.bias = head.weight.new_zeros(head.weight.shape[0], dtype=head.stats)

    def add(self, rows: slice, grad: Tensor, hidden: Tensor, head: _Head) -> None:
        """grad (r, V_p): d sum / d logits of these rows, 0 in rows that pad them."""
        self.bias += grad.sum(0)
        if hidden.dtype == grad.dtype:
            torch.mm(grad, head.weight, out=self.hidden[rows])
            self.weight.addmm_(grad.T, hidden)
        else:
            narrow = grad.to(hidden.dtype)
            self.hidden[rows] = torch.mm(narrow, head.weight)[: len(self.hidden[rows])]
            self.weight += torch.mm(narrow.T, hidden)
