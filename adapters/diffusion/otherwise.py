"""The bounds of short rows by other means than those that estimate them.

A bound is a sum over noise levels (times), of the mean over all noise that a level may draw, of nats at the positions
that the loss reads. The levels are written out: the steps of a chain, or nodes of a quadrature in continuous time.
Where noise is a mask, all patterns of masks are too, and nothing is drawn. Chains with more states draw noise at each
level, from torch's generator, and compute the nats by their definition.

What this shares with the estimate is the network, what it is told of the time, and the tables of chains, the prior at
their noisy end and the last step of the uniform one among them; not the draws, their weights or the fused losses.

B rows, L positions, M gathered positions, P patterns of masks, R repeats, V states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from adapters.base import Otherwise
from adapters.diffusion.network import Network
from adapters.documents import documents

if TYPE_CHECKING:
    from adapters.diffusion.process import Process

__all__ = [
    "Level",
    "Levels",
    "absorbing_kl",
    "bound_by_levels",
    "cross_entropy",
    "gauss",
    "largest_window",
    "over_log_odds",
]

CALL_ROWS = 512  # of the network at once
NETWORK_ROWS = 2**13  # of a row's patterns at all levels, at most
REPEATS, MOST_REPEATS = 8, 64  # of every level where noise is drawn
INNER_EDGES = (0.5, 0.9, 0.99, 0.999)  # of t, between which a quadrature has its panels
BISECTIONS = 80

# logits (M, V) fp64, clean tokens (M,), noisy tokens (M,) -> (M,) nats, the level's weight included
Nats = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Level:
    """`time`: what `Process.network_tau` reads; `masked`: the probability of a mask, where noise is one; else `noise`:
    clean tokens (M,) -> noisy ones."""

    time: float
    nats: Nats
    masked: float = 0.0
    noise: Callable[[Tensor, torch.Generator], Tensor] | None = None


@dataclass(frozen=True)
class Levels:
    """`prior` (M,) nats of clean tokens (M,) at the noisy end. `how`: in words what is summed over."""

    levels: list[Level]
    prior: Callable[[Tensor], Tensor]
    how: str


def bound_by_levels(
    process: Process, network: Network, x0: Tensor, noised: Tensor, doc_ids: Tensor, seed: int
) -> Otherwise | None:
    """Of x0 (B, L) at the `noised` positions, given all others; None of a process that knows no levels."""
    if (told := process.levels()) is None:
        return None
    nats, errors = [], []
    for row in range(len(x0)):
        one = (x0[row], noised[row], doc_ids[row])
        if process.mask_id is None:
            found, error = _drawn(process, network, told, *one, seed + row)
        else:
            found, error = _over_masks(process, network, told, *one), 0.0
        nats.append(found + float(told.prior(x0[row][noised[row]]).sum()))
        errors.append(error)
    every = "the sum over all patterns of masks, " if process.mask_id is not None else ""
    return Otherwise(
        torch.tensor(nats, dtype=torch.float64),
        torch.tensor(errors, dtype=torch.float64),
        f"{every}{told.how}",
    )


def largest_window(process: Process, most: int) -> int:
    """Targets of a row whose patterns of masks are no more than `NETWORK_ROWS` at all levels."""
    told = process.levels()
    if process.mask_id is None or told is None:
        return most
    times = len({level.time for level in told.levels})
    return max(1, min(most, int(math.log2(NETWORK_ROWS / times + 1))))


def _over_masks(
    process: Process, network: Network, told: Levels, x0: Tensor, noised: Tensor, doc_ids: Tensor
) -> float:
    """x0, noised, doc_ids (L,). Positions that share no noise (blocks) are masked apart, all others clean."""
    total = 0.0
    for group in process.noised_together(noised):  # (G,) places
        patterns = torch.from_numpy(_patterns(len(group)))  # (P, G) bool, of one mask or more
        xt = x0.repeat(len(patterns), 1)
        xt[:, group] = xt[:, group].masked_fill(patterns, process.mask)
        counts = patterns.sum(1).double()  # (P,)
        by_time: dict[float, list[Level]] = {}
        for level in told.levels:
            by_time.setdefault(level.time, []).append(level)
        read = torch.zeros(xt.shape, dtype=torch.bool)
        read[:, group] = patterns
        for time, levels in by_time.items():
            for rows, index, logits in _logits(process, network, x0, xt, read, doc_ids, time):
                clean, now = x0[index % len(x0)], xt.flatten()[rows.start * len(x0) + index]
                owner = rows.start + index // len(x0)
                for level in levels:
                    u, k = level.masked, counts[owner]
                    mass = u**k * (1 - u) ** (len(group) - k)
                    total += float((mass * level.nats(logits, clean, now)).sum())
    return total


def _drawn(
    process: Process,
    network: Network,
    told: Levels,
    x0: Tensor,
    noised: Tensor,
    doc_ids: Tensor,
    seed: int,
) -> tuple[float, float]:
    """Mean and standard error of R repeats, each of which draws noise at every level."""
    repeats = int(np.clip(NETWORK_ROWS // len(told.levels), REPEATS, MOST_REPEATS))
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(repeats, dtype=torch.float64)
    places = noised.nonzero().squeeze(1)
    for level in told.levels:
        assert level.noise is not None
        xt = x0.repeat(repeats, 1)
        xt[:, places] = level.noise(x0[places].repeat(repeats), generator).view(repeats, -1)
        read = noised.expand(xt.shape)
        for rows, index, logits in _logits(process, network, x0, xt, read, doc_ids, level.time):
            clean, now = x0[index % len(x0)], xt.flatten()[rows.start * len(x0) + index]
            sums.index_add_(0, rows.start + index // len(x0), level.nats(logits, clean, now))
    return float(sums.mean()), float(sums.std()) / math.sqrt(repeats)


def _logits(
    process: Process, network: Network, x0: Tensor, xt: Tensor, read: Tensor, doc_ids: Tensor, time: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of rows xt (P, L) at one time: some of the rows, places (M,) in them laid end to end where `read` (P, L), and
    logits (M, V) fp64 there, on the CPU."""
    streams = process.time_streams(xt.shape[1])
    for start in range(0, len(xt), CALL_ROWS):
        rows = slice(start, min(start + CALL_ROWS, len(xt)))
        count = rows.stop - start
        index = read[rows].flatten().nonzero().squeeze(1)
        at = torch.full((count, streams), time, dtype=torch.float64)
        hidden = network.hidden(
            xt[rows],
            process.network_tau(at, xt.shape[1]),
            index,
            **documents(network.model, doc_ids.repeat(count, 1)),
            **process.extra(x0.repeat(count, 1)),
        )
        for part, logits in network.logits(hidden):
            yield rows, index[part], logits.cpu()


def _patterns(count: int) -> np.ndarray:
    """(2^count - 1, count) bool: all but the empty one."""
    numbers = np.arange(1, 2**count)[:, None]
    return (numbers >> np.arange(count)) & 1 == 1


# -- what levels are made of ---------------------------------------------------------------------------------------


def cross_entropy(mask_id: int, weight: float) -> Nats:
    """`weight` times -log p of the clean token, by a softmax over all but the mask."""

    def nats(logits: Tensor, x0: Tensor, xt: Tensor) -> Tensor:
        tokens = logits.index_fill(1, torch.tensor(mask_id), -torch.inf)
        return -weight * tokens.log_softmax(1).gather(1, x0.unsqueeze(1)).squeeze(1)

    return nats


def absorbing_kl(
    mask_id: int, kept: tuple[float, float], zero_mask: bool, mixture: bool, last_from_clean: bool
) -> Nats:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) at a mask, written out: a step of a chain of which the shares `kept` (at s,
    at t) are still there. Of the prediction p, which may give the mask something, equation 4 makes
    p(y) (kept_s - kept_t) / Z for a token y and (1 - kept_s (1 - p_mask)) / Z for the mask."""
    at_s, at_t = kept

    def nats(logits: Tensor, x0: Tensor, xt: Tensor) -> Tensor:
        if zero_mask:
            logits = logits.index_fill(1, torch.tensor(mask_id), -torch.inf)
        p = logits.softmax(1)
        own = p.gather(1, x0.unsqueeze(1)).squeeze(1)
        if at_s == 1 and last_from_clean:
            return -own.log()
        of_mask = p[:, mask_id]
        if mixture:  # each prediction weighs 1 / q(x_t | x_0)
            whole = (1 - of_mask) / (1 - at_t) + of_mask
            own, of_mask = own / (1 - at_t) / whole, of_mask / whole
        z = 1 - at_t * (1 - of_mask)
        revealed, stays = (at_s - at_t) / (1 - at_t), (1 - at_s) / (1 - at_t)
        found = revealed * (math.log(revealed) - (own * (at_s - at_t) / z).log()) if revealed else 0 * own
        if stays:
            found = found + stays * (math.log(stays) - ((1 - at_s * (1 - of_mask)) / z).log())
        return found

    return nats


def gauss(low: float, high: float, nodes: int) -> list[tuple[float, float]]:
    """Nodes and weights of the Gauss-Legendre rule."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    half = (high - low) / 2
    return [(low + half * (1 + float(a)), half * float(b)) for a, b in zip(x, w, strict=True)]


def over_log_odds(
    function: Callable[[Tensor], Tensor], low: float, nodes: int = 8
) -> list[tuple[float, float, float]]:
    """(t, f(t), weight) for integrals over log f from t = `low` to 1, f rising and positive: nodes are even in log f
    within panels, and t is found by bisection, so that no derivative of f is asked for."""

    def at(t: float) -> float:
        return float(function(torch.tensor(t, dtype=torch.float64)))

    edges = [low, *(edge for edge in INNER_EDGES if edge > low), 1.0]
    found = []
    for left, right in zip(edges, edges[1:], strict=False):
        for log_f, weight in gauss(math.log(at(left)), math.log(at(right)), nodes):
            value = math.exp(log_f)
            lower, upper = left, right
            for _ in range(BISECTIONS):
                middle = (lower + upper) / 2
                lower, upper = (middle, upper) if at(middle) < value else (lower, middle)
            found.append((upper, value, weight))
    return found
