"""One row of logits to its loss and its gradient, in place: the kernel of every loss over a vocabulary.

A program has one row. It passes over it once for log-sum-exp (online: Milakov and Gimelshein 2018, algorithm 3) and
once more to write the gradient over the logits; the second read comes from the L2 cache, where the rows in flight fit.
What a loss makes of the statistics is its epilogue: a few lines, of scalars. Bound by memory, so what counts are bytes
in flight, hence the pipelined loads. The whole row in registers does not fit (it spills).

Shapes: r rows of a chunk, V columns that count of V_p, K targets of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.chunks import Rows, States
from kernels.tuned import launch

__all__ = ["CROSS_ENTROPY", "Cap", "Loss", "log1p", "overwrite", "sigmoid", "softplus"]

Cap = tuple[float, float, float, float] | None

IGNORED = tl.constexpr(-100)
LOWEST = tl.constexpr(-3.0e38)  # below any logit, and its exponential differences are no NaN


@dataclass(frozen=True)
class Loss:
    """What a loss asks of the kernel.

    `epilogue(scalars, w, v, masked, kept, real, lse, z_target, z_other, plain, gains, shares)`, called for each target
    with scalars of the row in the dtype of statistics, returns `(nats, aux, of_p, constant, of_share, at_target,
    at_other)`: two values and the gradient of `w nats + v aux` with respect to z, which is `of_p p_j + constant +
    of_share share_j`, plus `at_target` at the target and `at_other` at the other special column. p = exp(z - lse).

    That column is the mask where `by_mask`, else the noisy state of the row, if it has one. `without_other`: it has no
    probability and no gradient. `needs_sum`: `plain` is the sum of z. `log_odds`: the one of the row's own `scalars` by
    which `gains`, sum of softplus(log p_j + log_odds), and `shares`, sum of share_j = sigmoid(log p_j + log_odds), are
    made; -1: none.
    """

    epilogue: Any
    by_mask: bool = False
    without_other: bool = False
    needs_sum: bool = False
    log_odds: int = -1


def overwrite(
    loss: Loss, z: Tensor, rows: Rows, states: States, gradient: bool, cap: Cap = None
) -> tuple[Tensor, Tensor | None]:
    """The row step (kernels/chunks.py) in place: z (r, V_p), as the product left it, becomes its gradient if wanted.

    `rows`: contiguous; ids are targets (r, K) or (r,), then noisy states (r,), if there are any; scalars one tensor
    (r, S), or none. Targets of -100 score 0, others outside of the vocabulary NaN. cap (a, b, c, d): z counts as
    `a sigmoid((z + b) / c) + d`.
    """
    nats = torch.empty_like(rows.weights)
    aux = None if rows.aux_weights is None else torch.empty_like(rows.aux_weights)
    count, columns = z.shape
    if not count:
        return nats, aux
    targets, noisy = (*rows.ids, None)[:2]
    scalars = rows.scalars[0] if rows.scalars else None
    chosen = _launch(loss, z)
    _row_kernel[(count,)](
        z,
        targets,
        noisy,
        rows.weights,
        rows.aux_weights,
        scalars,
        nats,
        aux,
        z.stride(0),
        states.V,
        columns,
        states.n,
        -1 if states.mask_id is None else states.mask_id,
        EPILOGUE=loss.epilogue,
        TARGETS=rows.weights.numel() // count,
        SCALARS=0 if scalars is None else scalars.shape[1],
        BY_MASK=loss.by_mask,
        WITHOUT_OTHER=loss.without_other,
        NEEDS_SUM=loss.needs_sum,
        LOG_ODDS=loss.log_odds,
        CAP=cap,
        GRADIENT=gradient,
        ACC=tl.float64 if z.dtype == torch.float64 else tl.float32,
        STAGES=chosen.pop("num_stages"),
        **chosen,
    )
    return nats, aux


def _launch(loss: Loss, z: Tensor) -> dict[str, Any]:
    """A wide load of bf16 a thread and tile. Two programs of 16 warps on a multiprocessor keep the rows in flight at
    half of the L2 cache (H100, 50,304 columns: 26 of 50 MB), where the second read should find them. Chosen by what
    the compiler says of registers, not yet by a clock."""
    columns = z.shape[1]
    few = loss.log_odds < 0 and not loss.needs_sum  # sums by lane, which are registers
    block = min(4096 if few else 2048, triton.next_power_of_2(columns))
    return launch(
        "linear_loss.rows",
        z.device,
        {"columns": columns, "dtype": str(z.dtype), "sums": "few" if few else "many"},
        default={"BLOCK": block, "num_warps": max(1, block // 256), "num_stages": 3},
        vary={"BLOCK": (1024, 2048, 4096, 8192)},
    )


@triton.jit
def _read(z, column, there, CAP: tl.constexpr, ACC: tl.constexpr):
    """Logits as the loss sees them, and how they change with those that the product gave."""
    values = tl.load(z + column, mask=there, other=0.0).to(ACC)
    slope = values
    if CAP is not None:
        argument = (values + CAP[1]) / CAP[2]
        small = tl.exp(-tl.abs(argument))
        share = 1 / (1 + small)  # the larger of sigmoid(argument) and sigmoid(-argument)
        slope = share * share * small * (CAP[0] / CAP[2])
        values = CAP[0] * tl.where(argument < 0, small * share, share) + CAP[3]
    return values, slope


@triton.jit
def _log_sum_exp(
    z,
    columns,
    V,
    other,
    WITHOUT_OTHER: tl.constexpr,
    NEEDS_SUM: tl.constexpr,
    CAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """log sum exp of a row in one pass, and its sum if that is needed; both without the other column, if so."""
    top = tl.full((), LOWEST, ACC)
    total = tl.zeros([BLOCK], ACC)  # of exp(z - top), by lane
    plain = tl.zeros([BLOCK], ACC)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        values, _ = _read(z, column, column < columns, CAP, ACC)
        inside = column < V
        if WITHOUT_OTHER:
            inside &= column != other
        if NEEDS_SUM:
            plain += tl.where(inside, values, 0.0)
        values = tl.where(inside, values, -float("inf"))
        new_top = tl.maximum(top, tl.max(values, 0))
        total = total * tl.exp(top - new_top) + tl.exp(values - new_top)
        top = new_top
    return top + tl.log(tl.sum(total, 0)), tl.sum(plain, 0)


@triton.jit
def _sums_by_odds(
    z, columns, V, shift, CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """Sums of softplus(z + shift) and sigmoid(z + shift)."""
    gains = tl.zeros([BLOCK], ACC)
    shares = tl.zeros([BLOCK], ACC)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        values, _ = _read(z, column, column < columns, CAP, ACC)
        gains += tl.where(column < V, softplus(values + shift), 0.0)
        shares += tl.where(column < V, sigmoid(values + shift), 0.0)
    return tl.sum(gains, 0), tl.sum(shares, 0)


@triton.jit(do_not_specialize=["V", "real", "mask_id"])  # one binary for all vocabularies of a width
def _row_kernel(
    z,
    targets,
    noisy,
    weights,
    aux_weights,
    scalars,
    nats,
    aux,
    z_stride,
    V,
    columns,
    real,
    mask_id,
    EPILOGUE: tl.constexpr,
    TARGETS: tl.constexpr,
    SCALARS: tl.constexpr,
    BY_MASK: tl.constexpr,
    WITHOUT_OTHER: tl.constexpr,
    NEEDS_SUM: tl.constexpr,
    LOG_ODDS: tl.constexpr,
    CAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    targets += row * TARGETS
    weights += row * TARGETS
    nats += row * TARGETS
    if SCALARS:
        scalars += row * SCALARS
    state = tl.load(noisy + row) if noisy is not None else -1
    other = mask_id if BY_MASK else state

    lse, plain = _log_sum_exp(z, columns, V, other, WITHOUT_OTHER, NEEDS_SUM, CAP, ACC, BLOCK, STAGES)
    shift, gains, shares = lse, lse, lse
    if LOG_ODDS >= 0:
        shift = tl.load(scalars + LOG_ODDS) - lse
        gains, shares = _sums_by_odds(z, columns, V, shift, CAP, ACC, BLOCK, STAGES)
    z_other = lse
    if noisy is not None:
        z_other, _ = _read(z, other, other >= 0, CAP, ACC)
    v = lse * 0
    if aux_weights is not None:
        v = tl.load(aux_weights + row)
    beside, of_p, constant, of_share, at_other = v * 0, v * 0, v * 0, v * 0, v * 0
    special, pulls = (), ()  # each target, and what the gradient has there besides
    for k in tl.static_range(TARGETS):
        target = tl.load(targets + k)
        counts, known = target != IGNORED, (target >= 0) & (target < V)
        z_target, _ = _read(z, target, known, CAP, ACC)
        found = EPILOGUE(
            scalars,
            tl.where(counts, tl.load(weights + k), 0.0),
            v if k == 0 else v * 0,
            state == mask_id,
            state == target,
            real,
            lse,
            tl.where(known, z_target, float("nan")),
            z_other,
            plain,
            gains,
            shares,
        )
        tl.store(nats + k, tl.where(counts, found[0], 0.0))
        beside = tl.where(counts, found[1], beside)
        of_p += found[2]
        constant += found[3]
        of_share += found[4]
        at_other += found[6]
        special += (target,)  # type: ignore[assignment]
        pulls += (found[5],)  # type: ignore[assignment]
    if aux is not None:
        tl.store(aux + row, beside)

    if GRADIENT:
        tl.debug_barrier()  # every thread has read what it needs of the row
        for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK)
            values, slope = _read(z, column, column < columns, CAP, ACC)
            grad = of_p * tl.exp(values - lse) + constant
            if LOG_ODDS >= 0:
                grad += of_share * sigmoid(values + shift)
            for k in tl.static_range(TARGETS):
                grad += tl.where(column == special[k], pulls[k], 0.0)
            inside = column < V
            if WITHOUT_OTHER:
                inside &= column != other
            elif noisy is not None:
                grad += tl.where(column == other, at_other, 0.0)
            if CAP is not None:
                grad *= slope
            tl.store(z + column, tl.where(inside, grad, 0.0), mask=column < columns)


@triton.jit
def log1p(x):
    """log(1 + x) to the last digits for small x (Goldberg 1991, theorem 4)."""
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / tl.where(y == 1, 1.0, y - 1)))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _cross_entropy(scalars, w, v, masked, kept, real, lse, z_target, z_other, plain, gains, shares):
    """nats, and lse^2, whose weight is that of the z-loss."""
    return lse - z_target, lse * lse, w + v * 2 * lse, 0.0, 0.0, -w, 0.0


CROSS_ENTROPY = Loss(_cross_entropy)
