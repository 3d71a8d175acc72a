"""The selective scan in plain torch, in pieces that stay in a cache: no tensor holds the states of all steps.

Rows and channels are cut into tiles, time into blocks. Of a block everything is one operation for all its steps but the
recurrence itself, one `addcmul` a step. Where a step of all rows is too small to be worth an operation, time is
cut into lanes too, that run side by side: once to learn what each adds to the state and how much of it each leaves
(joined, these give the state that every lane starts from), once for results. The backward pass starts
from the states between blocks, and runs in reverse likewise; nothing is divided by a decay.

Shapes: tiles of R rows, K lanes of L steps, E channels, N states; blocks of S steps. States lie as (R, K, N, E), so
that the innermost axis is long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import at_least_fp32
from kernels.selective_scan.operation import Gradients, operation

__all__ = ["chunked"]

STEPS = 16  # of a block
TILE = 16384  # states of a tile, about: what a step works on
LANES_BELOW = 4096  # states of all rows: fewer run in lanes


@dataclass(frozen=True)
class Span:
    """Steps from `start` on: `lanes` of `length` steps each; their blocks are kept from number `block` on."""

    start: int
    lanes: int
    length: int
    block: int

    @property
    def stop(self) -> int:
        return self.start + self.lanes * self.length

    def of(self, t: Tensor) -> Tensor:
        """t (R, T, ...) -> (R, K, L, ...), a view."""
        return t[:, self.start : self.stop].unflatten(1, (self.lanes, self.length))

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """(where it is kept, first step, steps)."""
        starts = range(0, self.length, STEPS)
        return [(self.block + i, t, min(STEPS, self.length - t)) for i, t in enumerate(starts)]


def spans(batch: int, length: int, width: int, states: int) -> list[Span]:
    """All steps: in as many lanes as rows and channels leave room for, and what is left over behind them."""
    size = max(1, batch * width * states)
    lanes = max(1, min(LANES_BELOW // size, length // (2 * STEPS)))
    each = length // lanes
    found = [Span(0, lanes, each, 0)] if length else []
    if rest := length - lanes * each:
        found.append(Span(lanes * each, 1, rest, -(-each // STEPS)))
    return found


def kept_shape(batch: int, length: int, width: int, states: int) -> tuple[int, ...]:
    """Of the states before each block: (blocks, B, K, N, E)."""
    parts = spans(batch, length, width, states)
    return (
        sum(len(span.blocks) for span in parts),
        batch,
        max((span.lanes for span in parts), default=1),
        states,
        width,
    )


def tiles(batch: int, width: int, states: int) -> Iterator[tuple[slice, slice]]:
    """(rows, channels)."""
    parts = max(1, -(-width * states // (2 * TILE)))
    channels = -(-width // parts)
    rows = max(1, TILE // (channels * states))
    for row in range(0, batch, rows):
        for channel in range(0, width, channels):
            yield slice(row, row + rows), slice(channel, channel + channels)


class Tile:
    """A tile's inputs and the buffers of a block, in the dtype of states."""

    def __init__(
        self,
        rows: slice,
        channels: slice,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        initial: Tensor | None,
        reset: Tensor | None,
    ) -> None:
        self.stats = stats = at_least_fp32(u.dtype)
        self.rows, self.channels = rows, channels
        self.u, self.delta = u[rows, :, channels], delta[rows, :, channels]
        self.z = None if z is None else z[rows, :, channels]
        self.B, self.C = B[rows], C[rows]
        self.A = A[channels].to(stats).mT.contiguous()  # (N, E)
        self.D = None if D is None else D[channels].to(stats)
        self.bias = None if delta_bias is None else delta_bias[channels].to(stats)
        self.initial = None if initial is None else initial[rows, channels].to(stats).mT
        self.reset = None if reset is None else reset[rows]

    def first_state(self) -> Tensor:
        """(R, N, E)."""
        if self.initial is not None:
            return self.initial
        return self.A.new_zeros(len(self.u), *self.A.shape)

    def block(self, t: Tensor, span: Span, start: int, steps: int) -> Tensor:
        """t (R, T, ...) -> (S, R, K, ...) of these steps, in the dtype of states."""
        return span.of(t)[:, :, start : start + steps].movedim(2, 0).to(self.stats).contiguous()

    def raw_steps(self, span: Span, start: int, steps: int) -> Tensor:
        """What softplus makes step sizes of: (S, R, K, E)."""
        raw = self.block(self.delta, span, start, steps)
        return raw if self.bias is None else raw + self.bias

    def decays(self, out: Tensor, step: Tensor, span: Span, start: int) -> None:
        """exp(step * A), 0 where a document begins, for step (S, R, K, E) into out (S, R, K, N, E)."""
        torch.mul(step.unsqueeze(-2), self.A, out=out)
        out.exp_()
        if self.reset is not None:
            out.mul_(~self.fresh(span, start, len(step))[..., None, None])

    def fresh(self, span: Span, start: int, steps: int) -> Tensor:
        """Whether a document begins: (S, R, K)."""
        assert self.reset is not None
        return span.of(self.reset)[:, :, start : start + steps].movedim(2, 0)

    def leaves(self, span: Span) -> Tensor:
        """How much of a state is left behind each lane: (R, K, N, E)."""
        total = sum(F.softplus(self.raw_steps(span, t, s)).sum(0) for _, t, s in span.blocks)
        assert isinstance(total, Tensor)
        left = torch.exp(total.unsqueeze(-2) * self.A)
        return left if self.reset is None else left * ~span.of(self.reset).any(2)[..., None, None]

    def buffer(self, span: Span, extra: int) -> Tensor:
        """For the states of a block, and `extra` more: (S + extra, R, K, N, E)."""
        steps = min(STEPS, span.length) + extra
        return self.A.new_empty(steps, len(self.u), span.lanes, *self.A.shape)


def recur(decays: list[Tensor], states: list[Tensor]) -> None:
    """states[i + 1] += decays[i] * states[i], in order: states holds the one before, then what is added."""
    for decay, (before, state) in zip(decays, pairwise(states), strict=False):
        state.addcmul_(decay, before)


def recur_back(decays: list[Tensor], grads: list[Tensor]) -> None:
    """grads[i] += decays[i + 1] * grads[i + 1], from the last on."""
    for i in range(len(grads) - 2, -1, -1):
        grads[i].addcmul_(decays[i + 1], grads[i + 1])


def forward(y: Tensor, final: Tensor, kept: Tensor, *given: Tensor | None) -> None:
    """Fills y, final and kept, which is empty where nothing is to be differentiated."""
    u, A = given[0], given[2]
    assert u is not None and A is not None
    batch, length, width = u.shape
    for rows, channels in tiles(batch, width, A.shape[1]):
        tile = Tile(rows, channels, *given)  # type: ignore[arg-type]
        state = tile.first_state()
        for span in spans(batch, length, width, A.shape[1]):
            at_borders = kept[:, rows, : span.lanes, :, channels] if kept.numel() else None
            state = scan(tile, span, state, y[rows, :, channels], at_borders)
        final[rows, channels] = state.mT


def scan(tile: Tile, span: Span, state: Tensor, y: Tensor, kept: Tensor | None) -> Tensor:
    """Writes y (R, T, E) and kept (blocks, R, K, N, E) of the span's steps, from `state` (R, N, E) on -> the state
    behind them."""
    decay, states = (tile.buffer(span, extra) for extra in (0, 1))
    of_steps = decay.unbind(), states.unbind()
    if span.lanes == 1:
        states[0] = state.unsqueeze(1)
    else:
        states[0] = 0
        for _, t, steps in span.blocks:
            advance(tile, span, t, steps, decay, states, *of_steps)
            states[0] = states[steps]
        left, added = tile.leaves(span).unbind(1), states[0].clone().unbind(1)
        for k in range(span.lanes):
            states[0][:, k] = state
            state = left[k] * state + added[k]
    out = span.of(y)
    for i, t, steps in span.blocks:
        if kept is not None:
            kept[i] = states[0]
        inputs = advance(tile, span, t, steps, decay, states, *of_steps)
        result = read(tile, span, t, states[1 : steps + 1], inputs)
        if tile.z is not None:
            result.mul_(F.silu(tile.block(tile.z, span, t, steps)))
        out[:, :, t : t + steps] = result.movedim(0, 2)
        states[0] = states[steps]
    return states[0, :, -1].clone()


def advance(
    tile: Tile,
    span: Span,
    start: int,
    steps: int,
    decay: Tensor,
    states: Tensor,
    decays: tuple[Tensor, ...],
    of_steps: tuple[Tensor, ...],
) -> Tensor:
    """Fills decay[:steps] and states[1 : steps + 1], from states[0] on -> the inputs u (S, R, K, E)."""
    u = tile.block(tile.u, span, start, steps)
    step = F.softplus(tile.raw_steps(span, start, steps))
    tile.decays(decay[:steps], step, span, start)
    to_state = tile.block(tile.B, span, start, steps).unsqueeze(-1)
    torch.mul((step * u).unsqueeze(-2), to_state, out=states[1 : steps + 1])
    recur(list(decays[:steps]), list(of_steps[: steps + 1]))
    return u


def read(tile: Tile, span: Span, start: int, states: Tensor, u: Tensor) -> Tensor:
    """The outputs before the gate (S, R, K, E)."""
    of_state = tile.block(tile.C, span, start, len(states)).unsqueeze(-2)
    y = (of_state @ states).squeeze(-2)
    return y if tile.D is None else y.addcmul_(u, tile.D)


class Totals:
    """Gradients as they add up over tiles, blocks and steps."""

    def __init__(self, made: Gradients) -> None:
        self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.bias, self.initial = made
        for total in (self.A, self.B, self.C, self.D, self.bias):
            total.zero_()


def backward(made: Gradients, dy: Tensor, dfinal: Tensor | None, *given: Tensor | None) -> None:
    """Fills the gradients."""
    *inputs, kept = given
    u, A = inputs[0], inputs[2]
    assert u is not None and A is not None and kept is not None
    totals = Totals(made)
    batch, length, width = u.shape
    for rows, channels in tiles(batch, width, A.shape[1]):
        tile = Tile(rows, channels, *inputs)  # type: ignore[arg-type]
        grad = torch.zeros_like(tile.first_state())
        if dfinal is not None:
            grad = dfinal[rows, channels].to(tile.stats).mT
        for span in reversed(spans(batch, length, width, A.shape[1])):
            at_borders = kept[:, rows, : span.lanes, :, channels]
            grad = scan_back(tile, span, grad, dy[rows, :, channels], at_borders, totals)
        if tile.initial is not None:
            totals.initial[rows, channels] = grad.mT


def scan_back(tile: Tile, span: Span, grad: Tensor, dy: Tensor, kept: Tensor, totals: Totals) -> Tensor:
    """Adds up the gradients of the span's steps, from `grad` (R, N, E), that of the state behind it -> of the one
    before."""
    decay, states, grads = (tile.buffer(span, extra) for extra in (0, 1, 0))
    of_steps = decay.unbind(), states.unbind(), grads.unbind()
    if span.lanes == 1:
        arriving = grad.unsqueeze(1)
    else:
        arriving = torch.zeros_like(states[0])
        for _, t, steps in reversed(span.blocks):
            step = F.softplus(tile.raw_steps(span, t, steps))
            tile.decays(decay[:steps], step, span, t)
            at_outputs, _ = through_gate(tile, span, t, steps, dy, None)
            arriving = retreat(tile, span, t, steps, arriving, at_outputs, decay, grads, of_steps)
        left, added = tile.leaves(span).unbind(1), arriving.unbind(1)
        arriving = torch.empty_like(arriving)
        for k in reversed(range(span.lanes)):
            arriving[:, k] = grad
            grad = left[k] * grad + added[k]
    for i, t, steps in reversed(span.blocks):
        states[0] = kept[i]
        u = advance(tile, span, t, steps, decay, states, *of_steps[:2])
        at_outputs, at_gates = through_gate(
            tile, span, t, steps, dy, read(tile, span, t, states[1 : steps + 1], u)
        )
        arriving = retreat(tile, span, t, steps, arriving, at_outputs, decay, grads, of_steps)
        if at_gates is not None:
            put(totals.z[tile.rows, :, tile.channels], span, t, at_gates)
        of_block(tile, span, t, u, at_outputs, decay[:steps], states[: steps + 1], grads[:steps], totals)
    return arriving[:, 0]


def through_gate(
    tile: Tile, span: Span, start: int, steps: int, dy: Tensor, y: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the outputs before the gate, and, where those (y) are given, of what opens it: (S, R, K, E)."""
    grad = tile.block(dy, span, start, steps)
    if tile.z is None:
        return grad, None
    z = tile.block(tile.z, span, start, steps)
    share = torch.sigmoid(z)
    gates = None if y is None else grad * y * share * (1 + z * (1 - share))
    return grad * z * share, gates


def retreat(
    tile: Tile,
    span: Span,
    start: int,
    steps: int,
    arriving: Tensor,
    at_outputs: Tensor,
    decay: Tensor,
    grads: Tensor,
    of_steps: tuple[tuple[Tensor, ...], ...],
) -> Tensor:
    """Fills grads[:steps], those of the states, where `arriving` is that of the last one from what follows -> the
    same of the block before."""
    of_state = tile.block(tile.C, span, start, steps).unsqueeze(-1)
    torch.mul(at_outputs.unsqueeze(-2), of_state, out=grads[:steps])
    grads[steps - 1] += arriving
    recur_back(list(of_steps[0][:steps]), list(of_steps[-1][:steps]))
    return decay[0] * grads[0]


def of_block(
    tile: Tile,
    span: Span,
    start: int,
    u: Tensor,
    dy: Tensor,
    decay: Tensor,
    states: Tensor,
    grads: Tensor,
    totals: Totals,
) -> None:
    """Adds up the gradients of a block; overwrites its decays and states."""
    steps, where = len(u), (tile.rows, slice(None), tile.channels)
    raw = tile.raw_steps(span, start, steps)
    step = F.softplus(raw)
    to_state = tile.block(tile.B, span, start, steps).unsqueeze(-2)
    add(totals.C[tile.rows], span, start, (states[1:] @ dy.unsqueeze(-1)).squeeze(-1))
    add(totals.B[tile.rows], span, start, (grads @ (step * u).unsqueeze(-1)).squeeze(-1))
    at_inputs = (to_state @ grads).squeeze(-2)  # of step * u
    at_decays = decay.mul_(states[:-1]).mul_(grads)  # of step * A
    scratch = states[1:]
    torch.mul(at_decays, step.unsqueeze(-2), out=scratch)
    totals.A[tile.channels] += scratch.sum((0, 1, 2)).mT
    at_steps = at_decays.mul_(tile.A).sum(-2).addcmul_(at_inputs, u).mul_(torch.sigmoid(raw))
    put(totals.delta[where], span, start, at_steps)
    if tile.bias is not None:
        totals.bias[tile.channels] += at_steps.sum((0, 1, 2))
    at_inputs.mul_(step)
    if tile.D is not None:
        totals.D[tile.channels] += (dy * u).sum((0, 1, 2))
        at_inputs.addcmul_(dy, tile.D)
    put(totals.u[where], span, start, at_inputs)


def put(total: Tensor, span: Span, start: int, found: Tensor) -> None:
    """found (S, R, K, E) into total (R, T, E)."""
    span.of(total)[:, :, start : start + len(found)] = found.movedim(0, 2)


def add(total: Tensor, span: Span, start: int, found: Tensor) -> None:
    """As `put`, on top: tiles of other channels add theirs."""
    span.of(total)[:, :, start : start + len(found)] += found.movedim(0, 2)


chunked = operation("chunked", forward, backward, kept_shape)
