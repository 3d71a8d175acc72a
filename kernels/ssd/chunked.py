"""State-space duality by products of chunks of tokens, with its gradient by formula (Dao and Gu 2024, section 6).

Within a chunk tokens meet as in masked attention; between chunks states do. What lies between token j and token i of a
chunk is summed up from j on, for each j by itself: as a difference of two cumulative sums, steps of -0.001 behind one
of -10,000 would drown in it. No sum asks for documents; what lies in another is multiplied by 0 afterwards.

What lies between the products are `Passes` over memory, here in torch; kernels/ssd/cpp.py has them compiled.

Shapes: B rows, K chunks of Q tokens, H heads of P channels, G groups of J heads, N states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.documents import runs
from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["Passes", "by_products", "chunked"]


class Passes(Protocol):
    """products (B, K, G, Q, Q): C_i B_j for token i (row) and j (column); steps (B, K, Q, H); A, D (H,); run
    (B, K, Q)."""

    def weights(
        self, products: Tensor, steps: Tensor, A: Tensor, D: Tensor | None, run: Tensor | None
    ) -> Tensor:
        """W, how much of token j's input is in token i's output: (B, K, H, Q, Q) in the dtype of products."""

    def pulled(
        self,
        pairs: Tensor,
        products: Tensor,
        steps: Tensor,
        A: Tensor,
        D: Tensor | None,
        run: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """pairs (B, K, H, Q, Q): the gradient of W, as a product of outputs' gradients and inputs -> W; the gradients
        of products, of steps, of logs of decays (B, K, Q, H), and of D (without elements if there is none)."""

    def carried(self, added: Tensor, decay: Tensor, state: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        """added (B, K, H, P, N) by each chunk, decay (B, K, H) over it, state (B, H, P, N) before the first, or behind
        the last if `back` -> states that each chunk meets, in added's dtype, and the one that it ends with."""


def by_products(passes: Passes) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of an implementation (`reference` has its arguments and results)."""

    def implementation(
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
                passes,
            )
        return y.flatten(1, 2)[:, :tokens], last

    return implementation


def _cut(t: Tensor, length: int) -> Tensor:
    """(B, T, ...) -> (B, K, Q, ...), the last chunk filled up with zeros: steps of 0 change no state. Numbers of
    documents go on instead."""
    if missing := -t.shape[1] % length:
        last = t[:, -1:] if t.dtype == torch.int64 else t.new_zeros(len(t), 1, *t.shape[2:])
        t = torch.cat((t, last.expand(-1, missing, *t.shape[2:])), dim=1)
    return t.unflatten(1, (t.shape[1] // length, length))


class _Decays(NamedTuple):
    """What is left of something after a while, (B, K, Q, H): `since` from before the chunk to token i, `until` from
    token j to the chunk's end; 0 from one document to another."""

    since: Tensor
    until: Tensor


def _decays(steps: Tensor, A: Tensor, run: Tensor | None) -> _Decays:
    """steps (B, K, Q, H), A (H,), run (B, K, Q)."""
    logs = steps * A
    since = logs.cumsum(2).exp()
    until = F.pad(_from_here(logs)[:, :, 1:], (0, 0, 0, 1)).exp()
    if run is not None:
        before = F.pad(run[:, :-1, -1], (1, 0))  # (B, K); the first document is number 0
        since = since * (run == before[..., None])[..., None]
        until = until * (run == run[..., -1:])[..., None]
    return _Decays(since, until)


class _Plain:
    """`Passes` in torch, in place where it can be."""

    def weights(
        self, products: Tensor, steps: Tensor, A: Tensor, D: Tensor | None, run: Tensor | None
    ) -> Tensor:
        left, met = self.left(steps, A, run)
        return self.weighted((products * met)[:, :, :, None], left, steps, D, products.dtype)

    def pulled(
        self,
        pairs: Tensor,
        products: Tensor,
        steps: Tensor,
        A: Tensor,
        D: Tensor | None,
        run: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        left, met = self.left(steps, A, run)
        exact, of_steps = steps.dtype, steps.transpose(2, 3)[..., None, :]
        found = pairs.to(exact)
        dD = steps.new_empty(0) if D is None else found.diagonal(dim1=-2, dim2=-1).sum((0, 1, 3))
        found *= left
        seen, groups = (products * met)[:, :, :, None], products.shape[2]  # (B, K, G, 1, Q, Q)
        weights = self.weighted(seen, left, steps, D, products.dtype)
        scaled = torch.mul(found, of_steps, out=left)
        dproducts = (_of_groups(scaled, groups).sum(3) * met).to(products.dtype)
        _of_groups(found, groups).mul_(seen)
        dsteps = found.sum(-2).transpose(2, 3)
        return weights, dproducts, dsteps, _across(found.mul_(of_steps)).transpose(2, 3), dD

    def carried(self, added: Tensor, decay: Tensor, state: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        met, state, wide = torch.empty_like(added), state.clone(), torch.empty_like(state)
        chunks = range(added.shape[1])
        for chunk in reversed(chunks) if back else chunks:
            met[:, chunk] = state
            state.mul_(decay[:, chunk, :, None, None]).add_(wide.copy_(added[:, chunk]))
        return met, state

    def left(self, steps: Tensor, A: Tensor, run: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, K, H, Q, Q): what is left from token j to token i >= j of a chunk; and (B, K, 1, Q, Q) or (Q, Q): 1 where
        token i sees token j, 0 where j comes later or in another document. The first is for what is 0 there already."""
        logs = (steps * A).transpose(2, 3).contiguous()  # (B, K, H, Q)
        met = torch.ones(logs.shape[-1:] * 2, dtype=logs.dtype, device=logs.device).tril()
        left = (logs[..., None] * met.tril(-1)).cumsum_(-2).exp_()
        if run is not None:
            met = met * (run[:, :, None, :, None] == run[:, :, None, None, :])
        return left, met

    def weighted(
        self, products: Tensor, left: Tensor, steps: Tensor, D: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """W in `dtype`, of products (B, K, G, 1, Q, Q); `left` is used up."""
        _of_groups(left, products.shape[2]).mul_(products)
        left.mul_(steps.transpose(2, 3)[..., None, :])
        if D is not None:
            left.diagonal(dim1=-2, dim2=-1).add_(D[:, None])
        return left.to(dtype, copy=True)


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
    """x (B, K, Q, H, P), steps d (B, K, Q, H), A and D (H,), B and C (B, K, Q, G, N), initial (B, H, P, N), run
    (B, K, Q) -> y like x, the last states.

        y_i = sum over j <= i of W_ij x_j + since_i h C_i,  W_ij = within_ij (C_i B_j) d_j + D [i = j]
        h' = since_Q h + sum over j of until_j d_j x_j B_j,  h what enters a chunk

    Passes over what is of the size of x are few, of one dtype, and in place where they can be: on a CPU they take
    longer than the products, and new memory longer than what is written to it.
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
        passes: Passes,
    ) -> tuple[Tensor, Tensor]:
        (rows, chunks, length, heads, width), groups = x.shape, B.shape[3]
        decays = _decays(steps, A, run)
        into, out = _by_group(B, groups), _by_group(C, groups)  # (B K G, Q, N)
        products = torch.bmm(out, into.mT).view(rows, chunks, groups, length, length)
        near = torch.bmm(passes.weights(products, steps, A, D, run).flatten(0, 2), _by_head(x))
        added = torch.bmm(_by_group(_scaled(x, steps * decays.until), groups).mT, into)  # (B K G, J P, N)
        added = added.view(rows, chunks, heads, width, B.shape[4])
        entering, last = passes.carried(added, decays.since[:, :, -1], initial, False)
        far = _from_groups(torch.bmm(out, _states_by_group(entering, groups).mT), x, groups)
        y = torch.addcmul(_from_heads(near, x), far, decays.since[..., None].to(x.dtype))
        ctx.save_for_backward(x, steps, A, B, C, D, run, entering, far)
        ctx.passes = passes
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with own_dtypes(gradients[0].device):
            return *_gradients(ctx.passes, ctx.saved_tensors, *gradients), None, None


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    """x (B, K, Q, H, P), factors (B, K, Q, H) -> their product in x's dtype."""
    return x * factors[..., None].to(x.dtype)


def _of_groups(t: Tensor, groups: int) -> Tensor:
    """(B, K, H, ...) -> (B, K, G, J, ...)."""
    return t.unflatten(2, (groups, -1))


def _gradients(
    passes: Passes, saved: tuple[Any, ...], dy: Tensor, dlast: Tensor
) -> tuple[Tensor | None, ...]:
    """Of everything. That of a token's log of decay is the sum over all that this decay stands between; as a difference
    of larger sums it would not be 0 where everything is forgotten, and is to be multiplied by a step of 10,000."""
    x, steps, A, B, C, D, run, entering, far = saved
    groups, dtype, exact = B.shape[3], x.dtype, steps.dtype
    decays = _decays(steps, A, run)
    into, out = _by_group(B, groups), _by_group(C, groups)
    over = decays.since[:, :, -1]  # (B, K, H), a whole chunk

    # Between chunks.
    reached = _by_group(_scaled(dy, decays.since), groups)  # what of dy reaches the states that entered
    pulled = torch.bmm(reached.mT, out).view(entering.shape)
    leaving, dinitial = passes.carried(pulled, over, dlast.to(exact), True)  # of the states behind each chunk
    dstates = _states_by_group(leaving, groups)
    given = _from_groups(torch.bmm(into, dstates.mT), x, groups)  # by what comes later
    left = steps * decays.until
    kept = _by_group(_scaled(x, left), groups)
    space = torch.empty_like(x, memory_format=torch.contiguous_format)
    at_end = _dotted(x, given, space) * decays.until  # (B, K, Q, H), to steps
    crossed = torch.mul(entering, leaving, out=pulled).flatten(3).sum(-1).to(exact) * over
    dlogs = _from_here(_dotted(dy, far, space) * decays.since) + _before(at_end * steps) + crossed[:, :, None]

    # Within.
    gradients = _by_head(dy)
    (rows, chunks, length, heads, _) = x.shape
    pairs = torch.bmm(gradients, _by_head(x).mT).view(rows, chunks, heads, length, length)
    products = torch.bmm(out, into.mT).view(rows, chunks, groups, length, length)
    weights, dproducts, dsteps, dwithin, dD = passes.pulled(pairs, products, steps, A, D, run)
    weights, dproducts = weights.flatten(0, 2), dproducts.flatten(0, 2)
    dx = torch.addcmul(_from_heads(torch.bmm(weights.mT, gradients), x), given, left[..., None].to(dtype))
    dlogs = dlogs + dwithin
    dB = torch.baddbmm(torch.bmm(kept, dstates), dproducts.mT, out)
    dC = torch.baddbmm(torch.bmm(reached, _states_by_group(entering, groups)), dproducts, into)
    return (
        dx,
        dsteps + at_end + dlogs * A,
        (steps * dlogs).sum((0, 1, 2)),
        _from_groups(dB, B, groups),
        _from_groups(dC, C, groups),
        None if D is None else dD,
        dinitial,
    )


def _dotted(a: Tensor, b: Tensor, space: Tensor) -> Tensor:
    """(B, K, Q, H, P) three times -> (B, K, Q, H), at least fp32."""
    return torch.mul(a, b, out=space).sum(-1).to(at_least_fp32(a.dtype))


def _from_here(t: Tensor) -> Tensor:
    """t (B, K, Q, H) -> for each token of a chunk the sum over it and all behind it."""
    return t.flip(2).cumsum(2).flip(2)


def _before(t: Tensor) -> Tensor:
    """t (B, K, Q, H) -> for each token of a chunk the sum over all before it."""
    return F.pad(t[:, :, :-1].cumsum(2), (0, 0, 1, 0))


def _across(pairs: Tensor) -> Tensor:
    """pairs (B, K, H, Q, Q), used up -> for each token k the sum over all pairs (i, j) with j < k <= i."""
    later = pairs.new_ones(pairs.shape[-2:]).tril(-1)[:, :-1]
    return F.pad(pairs.cumsum_(-1)[..., :-1].mul_(later).sum(-2), (1, 0))


chunked = by_products(_Plain())
