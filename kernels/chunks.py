"""The one path of losses over an output layer whose logits never exist for all rows at once.

A chunk's logits, losses AND gradients are computed in the forward pass, where the weight of every row is known; the
backward only scales what is stored: the three matrix products of the plain path, and memory for one chunk, M x D and
V_p x D (the idea of Liger-Kernel, Hsu et al. 2024, arXiv:2410.10989, section 3.2). What a row of logits is worth is a
`RowStep`: those in torch stand in `rows.py` of each operation.

Shapes: M rows, r of a chunk, D width, V states, V_p rows of the head (V, or more with padding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import at_least_fp32, own_dtypes

__all__ = [
    "Losses",
    "Mode",
    "RowStep",
    "Rows",
    "States",
    "differentiable",
    "in_chunks",
    "refuse_second_order",
    "scaled",
]

# Rows of low-precision products. Where their number is drawn anew in every step, the library compiles and keeps a
# product for each shape it meets: a megabyte a step at first.
ROW_MULTIPLE = 64
COLUMN_MULTIPLE = (
    64  # of copies of the head: odd numbers of columns make products, and loads of their rows, slow
)


@dataclass(frozen=True)
class States:
    """What columns of logits stand for: V states, of which n are real tokens; `mask_id` is the remaining one, or
    None."""

    V: int
    n: int
    mask_id: int | None


@dataclass(frozen=True)
class Rows:
    """What is known of rows besides their logits, the rows being the first axis of each tensor.

    `ids` int64; `weights` of the losses, (M,) or (M, k) for k losses a row, and `aux_weights` (M,) of what is beside
    them, in the dtype of statistics; `scalars` as the mode understands them.
    """

    ids: tuple[Tensor, ...]
    weights: Tensor
    aux_weights: Tensor | None = None
    scalars: tuple[Tensor, ...] = ()

    def __getitem__(self, chunk: slice) -> Rows:
        return Rows(
            tuple(t[chunk] for t in self.ids),
            self.weights[chunk],
            None if self.aux_weights is None else self.aux_weights[chunk],
            tuple(t[chunk] for t in self.scalars),
        )


class Mode(Protocol):
    """A loss of rows of logits. Its objects are constants: what varies is in `Rows`."""

    def rows(self, z: Tensor, rows: Rows, states: States, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Of logits z (r, V) in at least fp32: nats like `rows.weights` and, where there are `aux_weights`, aux (r,).
        z is overwritten; with `gradient` by that of `sum(weights * nats) + sum(aux_weights * aux)`."""


# (z (r, V), their rows, gradient) -> as `Mode.rows`. In place: z (r, V_p), of which columns from V on are to become 0.
RowStep = Callable[[Tensor, Rows, bool], "tuple[Tensor, Tensor | None]"]


class Losses(NamedTuple):
    """`nats` like `Rows.weights` and `aux` (M,), empty without `aux_weights`; gradients of
    `sum(weights * nats) + sum(aux_weights * aux)`, empty where they were not asked for: `hidden` (M, D) in its dtype,
    `weight` (V_p, D) and `bias` (V_p,) in the dtype of statistics."""

    nats: Tensor
    aux: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor

    def total(self, rows: Rows) -> Tensor:
        """()"""
        total = (rows.weights * self.nats).sum()
        return total if rows.aux_weights is None else total + (rows.aux_weights * self.aux).sum()


def in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    step: RowStep,
    *,
    V: int,
    chunk_rows: int,
    needed: tuple[bool, bool, bool],
    in_place: bool = False,
) -> Losses:
    """Losses of all rows, `chunk_rows` at a time, and the gradients that are `needed`: of hidden, weight, bias.

    hidden (M, D) in the dtype of the products; weight (V_p, D) and bias (V_p,) or None in any. `step` gets logits in
    the dtype of statistics, or, if it works `in_place`, as the product left them. Nothing here waits for the device.
    """
    stats = rows.weights.dtype
    head = _Head(weight, bias, hidden.dtype, hidden.dtype if in_place else stats)
    grads = _Gradients(hidden, head, stats, needed)
    nats = torch.empty_like(rows.weights)
    aux = rows.weights.new_empty(0 if rows.aux_weights is None else hidden.shape[0])
    buffer = head.buffer(min(chunk_rows, hidden.shape[0]))
    for start in range(0, hidden.shape[0], chunk_rows):
        chunk = slice(start, min(start + chunk_rows, hidden.shape[0]))
        count = chunk.stop - chunk.start
        part = head.rounded(hidden[chunk])
        z = head.logits(part, buffer)  # (r, V_p), rows behind `count` are padding
        seen = z[:count] if in_place else z[:count, :V]
        nats[chunk], beside = step(seen, rows[chunk], any(needed))
        if beside is not None:
            aux[chunk] = beside
        if any(needed):
            if z.shape[1] > V and not in_place:
                z[:, V:] = 0
            if z.shape[0] > count:
                z[count:] = 0
            grads.add(chunk, z, part)
    return Losses(nats, aux, grads.hidden, grads.weight[: weight.shape[0]], grads.bias[: weight.shape[0]])


class _Head:
    """The output layer, converted once for all chunks: `weight` (V_p, D) in the dtype of products, padded where they
    are much faster for it; `bias` (V_p,) in that of logits, or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, logits: torch.dtype) -> None:
        rows = weight.shape[0]
        self.weight, self.dtype = weight.detach(), logits
        self.narrow = at_least_fp32(dtype) != dtype
        ragged = rows % COLUMN_MULTIPLE and (self.narrow or weight.device.type != "cpu")
        if weight.dtype != dtype or ragged:
            rows = -(-rows // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
            self.weight = weight.new_zeros(rows, weight.shape[1], dtype=dtype)
            self.weight[: weight.shape[0]] = weight.detach()
        self.bias = None
        if bias is not None:
            self.bias = bias.new_zeros(rows, dtype=logits)
            self.bias[: bias.shape[0]] = bias.detach()

    def buffer(self, rows: int) -> Tensor:
        """Where products of up to so many rows are written."""
        multiple = ROW_MULTIPLE if self.narrow else 1
        return self.weight.new_empty(-(-rows // multiple) * multiple, self.weight.shape[0])

    def rounded(self, hidden: Tensor) -> Tensor:
        """With rows of zeros up to a number that products like."""
        missing = -hidden.shape[0] % ROW_MULTIPLE if self.narrow else 0
        return F.pad(hidden, (0, 0, 0, missing)) if missing else hidden

    def logits(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """(r, D) -> (r, V_p) in the dtype of logits, the caller's to overwrite."""
        out = buffer[: hidden.shape[0]]
        if self.bias is not None and self.bias.dtype == hidden.dtype:
            return torch.addmm(self.bias, hidden, self.weight.T, out=out)
        z = torch.mm(hidden, self.weight.T, out=out).to(self.dtype)
        return z if self.bias is None else z.add_(self.bias)


class _Gradients:
    """Sums over chunks, in the dtype of statistics: a sum of thousands of bf16 terms would stop growing."""

    def __init__(
        self, hidden: Tensor, head: _Head, stats: torch.dtype, needed: tuple[bool, bool, bool]
    ) -> None:
        self.head, self.needed = head, needed
        rows, width = head.weight.shape
        self.hidden = torch.empty_like(hidden) if needed[0] else hidden.new_empty(0, width)
        self.weight = head.weight.new_zeros(rows if needed[1] else 0, width, dtype=stats)
        self.bias = head.weight.new_zeros(rows if needed[2] else 0, dtype=stats)

    def add(self, chunk: slice, grad: Tensor, hidden: Tensor) -> None:
        """grad (r, V_p): of these rows' logits, 0 in rows that pad them."""
        of_hidden, of_weight, of_bias = self.needed
        if of_bias:
            self.bias += grad.sum(0, dtype=self.bias.dtype)
        narrow = grad.to(hidden.dtype)
        if of_hidden:
            found = self.hidden[chunk]
            torch.mm(narrow[: found.shape[0]], self.head.weight, out=found)
        if of_weight:
            _add_product(self.weight, narrow.T, hidden)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the precision of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b)


def differentiable(
    mode: Mode,
    states: States,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum (), nats, aux) by the mode's row step in torch. The sum is differentiable in hidden (M, D), which has the
    dtype of the products, weight, bias and `rows.weights`, `rows.aux_weights`; the others are detached."""
    with own_dtypes(hidden.device):
        return _Chunked.apply(
            hidden,
            weight,
            bias,
            rows.weights,
            rows.aux_weights,
            mode,
            states,
            chunk_rows,
            torch.is_grad_enabled(),
            len(rows.ids),
            *rows.ids,
            *rows.scalars,
        )


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        aux_weights: Tensor | None,
        mode: Mode,
        states: States,
        chunk_rows: int,
        with_gradients: bool,  # `needs_input_grad` is True under no_grad too, where the gradients would be wasted
        ids: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = Rows(tensors[:ids], weights, aux_weights, tensors[ids:])
        needed = [with_gradients and need for need in ctx.needs_input_grad]
        found = in_chunks(
            hidden,
            weight,
            bias,
            rows,
            lambda z, part, gradient: mode.rows(z, part, states, gradient),
            V=states.V,
            chunk_rows=chunk_rows,
            needed=(needed[0], needed[1], needed[2]),
        )
        ctx.save_for_backward(
            found.hidden if needed[0] else None,
            found.weight if needed[1] else None,
            found.bias if needed[2] else None,
            found.nats if needed[3] else None,
            found.aux if needed[4] else None,
        )
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, weights, aux_weights)]
        ctx.mark_non_differentiable(found.nats, found.aux)
        return found.total(rows), found.nats, found.aux

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        found = [scaled(g, grad_sum, t) for g, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *found, *[None] * (len(ctx.needs_input_grad) - len(found))


def refuse_second_order() -> None:
    """RuntimeError in a backward pass that is to be differentiated: stored gradients would pass as constants."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "gradients of this loss were computed with it and have none of their own (create_graph=True); "
            "kernels=reference has them"
        )


def scaled(grad: Tensor | None, grad_sum: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """A stored gradient of the sum times the gradient () of the sum, rounded once, to `dtype`."""
    if grad is None:
        return None
    # Neither factor is rounded before: with as many axes as the other, () counts in the choice of a common dtype. And
    # written at once: a product in fp32 of its own would be the largest tensor of the backward pass.
    return torch.mul(grad, grad_sum.view((1,) * grad.ndim), out=torch.empty_like(grad, dtype=dtype))
