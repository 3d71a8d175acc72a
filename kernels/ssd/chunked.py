"""State-space duality by products of chunks of tokens, with its gradient by formula (Dao and Gu 2024, section 6).

Within a chunk tokens meet as in masked attention; between chunks states do. What lies between token j and token i of a
chunk is summed up from j on, for each j by itself: as a difference of two cumulative sums, steps of -0.001 behind one
of -10,000 would drown in it. No sum asks for documents; what lies in another is multiplied by 0 afterwards.

Shapes: B rows, K chunks of Q tokens, H heads of P channels, G groups of J heads, N states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.documents import runs
from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["chunked"]


def chunked(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    doc_ids: Tensor | None,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `reference`."""
    rows, tokens, heads, width = x.shape
    exact = at_least_fp32(x.dtype)
    length = min(tokens, chunk)
    if initial is None:
        initial = x.new_zeros(rows, heads, width, B.shape[-1], dtype=exact)
    with own_dtypes(x.device):
        steps = F.softplus(delta.to(exact) + (0.0 if delta_bias is None else delta_bias.to(exact)))
        y, last = _Chunks.apply(
            _cut(x, length),
            _cut(steps, length),
            A.to(exact),
            _cut(B.to(x.dtype), length),
            _cut(C.to(x.dtype), length),
            None if D is None else D.to(exact),
            initial.to(exact),
            None if doc_ids is None else _cut(runs(doc_ids), length),
        )
    return y.flatten(1, 2)[:, :tokens], last


def _cut(t: Tensor, length: int) -> Tensor:
    """(B, T, ...) -> (B, K, Q, ...), the last chunk filled up with zeros: steps of 0 change no state. Numbers of
    documents go on instead."""
    if missing := -t.shape[1] % length:
        last = t[:, -1:] if t.dtype == torch.int64 else t.new_zeros(len(t), 1, *t.shape[2:])
        t = torch.cat((t, last.expand(-1, missing, *t.shape[2:])), dim=1)
    return t.unflatten(1, (t.shape[1] // length, length))


class _Decays(NamedTuple):
    """What is left of something after a while: `within` (B, K, H, Q, Q) from token j (row) to token i (column) of a
    chunk, 0 where i < j; `since` (B, K, Q, H) from before the chunk to token i; `until` (B, K, Q, H) from token j to
    the chunk's end. 0 where a document ends in between."""

    within: Tensor
    since: Tensor
    until: Tensor


def _decays(steps: Tensor, A: Tensor, run: Tensor | None) -> _Decays:
    """steps (B, K, Q, H), A (H,), run (B, K, Q)."""
    logs = (steps * A).transpose(2, 3).contiguous()  # (B, K, H, Q)
    length = logs.shape[-1]
    within = logs[..., None, :].expand(*logs.shape[:3], length, length).triu(1).cumsum(-1).exp().triu()
    since = logs.cumsum(-1).exp().transpose(2, 3)
    if run is not None:
        within = within * (run[:, :, None, :, None] == run[:, :, None, None, :])
        before = F.pad(run[:, :-1, -1], (1, 0))  # (B, K); the first document is number 0
        since = since * (run == before[..., None])[..., None]
    return _Decays(within, since, within[..., -1].transpose(2, 3))


def _by_group(t: Tensor, groups: int) -> Tensor:
    """(B, K, Q, H, P) or (B, K, Q, G, N) -> (B K G, Q, J P or N)."""
    return t.flatten(3).unflatten(3, (groups, -1)).transpose(2, 3).flatten(0, 2)


def _from_groups(t: Tensor, like: Tensor, groups: int) -> Tensor:
    """Back: (B K G, Q, J P or N) -> the shape of `like`, (B, K, Q, H, P) or (B, K, Q, G, N)."""
    rows, chunks, length = like.shape[:3]
    return t.view(rows, chunks, groups, length, t.shape[-1]).transpose(2, 3).reshape(like.shape)


def _states_by_group(states: Tensor, groups: int) -> Tensor:
    """(B, K, H, P, N) -> (B K G, J P, N)."""
    return states.unflatten(2, (groups, -1)).flatten(3, 4).flatten(0, 2)


def _by_head(t: Tensor) -> Tensor:
    """(B, K, Q, H, P) -> (B K H, Q, P)."""
    return t.transpose(2, 3).flatten(0, 2)


def _from_heads(t: Tensor, like: Tensor) -> Tensor:
    rows, chunks, length, heads, width = like.shape
    return t.view(rows, chunks, heads, length, width).transpose(2, 3)


class _Chunks(torch.autograd.Function):
    """x (B, K, Q, H, P), steps (B, K, Q, H), A and D (H,), B and C (B, K, Q, G, N), initial (B, H, P, N), run
    (B, K, Q) -> y like x, the last states.

        y_i = sum over j <= i of within_ji (B_j C_i) v_j + since_i h C_i + D x_i,  v = steps x, h what enters a chunk
        h' = since_Q h + sum over j of until_j v_j B_j
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        steps: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial: Tensor,
        run: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        (rows, chunks, _, heads, width), groups = x.shape, B.shape[3]
        decays = _decays(steps, A, run)
        into, out = _by_group(B, groups), _by_group(C, groups)  # (B K G, Q, N)
        weights, _ = _weights(decays, into, out, groups)
        values = _by_head(x * steps[..., None].to(x.dtype))  # (B K H, Q, P)
        near = torch.bmm(weights.mT, values)
        added = torch.bmm(_by_group(_scaled(x, steps * decays.until), groups).mT, into)  # (B K G, J P, N)
        added = added.view(rows, chunks, heads, width, B.shape[4])
        entering, last = _carried(added, decays.since[:, :, -1], initial, x.dtype)
        far = _from_groups(torch.bmm(out, _states_by_group(entering, groups).mT), x, groups)
        y = _from_heads(near, x) + far * decays.since[..., None]
        if D is not None:
            y = y + x * D[:, None]
        ctx.save_for_backward(x, steps, A, B, C, D, run, entering, far)
        # A conversion that converts nothing returns its argument: compiled by torch 2.11, the gradient of what
        # `forward` returned got lost behind it.
        return (y if y.dtype == x.dtype else y.to(x.dtype)), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with own_dtypes(gradients[0].device):
            return _gradients(ctx.saved_tensors, *gradients)


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    """x (B, K, Q, H, P), factors (B, K, Q, H) -> their product in x's dtype."""
    return (x * factors[..., None]).to(x.dtype)


def _weights(decays: _Decays, into: Tensor, out: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """What token j gives to token i, (B K H, Q, Q) in the dtype of products, and before decay (B, K, G, 1, Q, Q)."""
    within = decays.within
    rows, chunks, _, length, _ = within.shape
    products = torch.bmm(into, out.mT).view(rows, chunks, groups, 1, length, length).to(within.dtype)
    weights = within.unflatten(2, (groups, -1)) * products
    return weights.to(into.dtype).flatten(2, 3).flatten(0, 2), products


def _carried(added: Tensor, decay: Tensor, initial: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """added (B, K, H, P, N) by each chunk, decay (B, K, H) over it -> states that enter each, in `dtype`, and the last
    (B, H, P, N)."""
    entering, state = [], initial
    for chunk in range(added.shape[1]):
        entering.append(state.to(dtype))
        state = torch.addcmul(added[:, chunk].to(state.dtype), state, decay[:, chunk, :, None, None])
    return torch.stack(entering, dim=1), state


def _gradients(saved: tuple[Any, ...], dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    """Of everything. That of a token's log of decay is the sum over all that this decay stands between; as a difference
    of larger sums it would not be 0 where everything is forgotten, and is to be multiplied by a step of 10,000."""
    x, steps, A, B, C, D, run, entering, far = saved
    groups = B.shape[3]
    dtype, exact = x.dtype, steps.dtype
    decays = _decays(steps, A, run)
    into, out = _by_group(B, groups), _by_group(C, groups)
    weights, products = _weights(decays, into, out, groups)
    states = _states_by_group(entering, groups)

    # Between chunks.
    reached = _scaled(dy, decays.since)  # what of dy reaches the states that entered
    pulled = torch.bmm(_by_group(reached, groups).mT, out).view(entering.shape)
    leaving, dinitial = _carried(pulled.flip(1), decays.since[:, :, -1].flip(1), dlast.to(exact), dtype)
    leaving = leaving.flip(1)  # gradient of the states behind each chunk
    dstates = _states_by_group(leaving, groups)
    given = (
        _from_groups(torch.bmm(into, dstates.mT), x, groups) * decays.until[..., None]
    )  # to v, by what comes later
    kept = _scaled(x, steps * decays.until)
    at_end = (x * given).sum(-1) * steps  # (B, K, Q, H)
    crossed = (entering.to(exact) * leaving).sum((-2, -1)) * decays.since[:, :, -1]  # (B, K, H)
    dlogs = _from_here((reached * far).sum(-1, dtype=exact)) + _before(at_end) + crossed[:, :, None]

    # Within.
    gradients, values = _by_head(dy), _by_head(_scaled(x, steps))
    dvalues = _from_heads(torch.bmm(weights, gradients), x) + given
    pairs = torch.bmm(values, gradients.mT).view_as(decays.within) * decays.within  # (B, K, H, Q, Q)
    dproducts = pairs.unflatten(2, (groups, -1)).sum(3).to(dtype).flatten(0, 2)  # (B K G, Q, Q)
    pairs = (pairs.unflatten(2, (groups, -1)) * products).flatten(2, 3)
    dlogs += _across(pairs).transpose(2, 3)
    dB = torch.baddbmm(torch.bmm(_by_group(kept, groups), dstates), dproducts, out)
    dC = torch.baddbmm(torch.bmm(_by_group(reached, groups), states), dproducts.mT, into)

    dsteps = dlogs * A + (x * dvalues).sum(-1)
    dx = dvalues * steps[..., None]
    dD = None
    if D is not None:
        dx = dx + dy * D[:, None]
        dD = (x * dy).sum((0, 1, 2, 4), dtype=exact)
    dA = (steps * dlogs).sum((0, 1, 2))
    return (
        dx.to(dtype),
        dsteps,
        dA,
        _from_groups(dB, B, groups),
        _from_groups(dC, C, groups),
        dD,
        dinitial,
        None,
    )


def _from_here(t: Tensor) -> Tensor:
    """t (B, K, Q, H) -> for each token of a chunk the sum over it and all behind it."""
    return t.flip(2).cumsum(2).flip(2)


def _before(t: Tensor) -> Tensor:
    """t (B, K, Q, H) -> for each token of a chunk the sum over all before it."""
    return F.pad(t[:, :, :-1].cumsum(2), (0, 0, 1, 0))


def _across(pairs: Tensor) -> Tensor:
    """pairs (B, K, H, Q, Q) -> for each token k the sum over all pairs (j, i) with j < k <= i."""
    return F.pad(pairs[..., :-1, :].cumsum(-2).triu(1).sum(-1), (1, 0))
