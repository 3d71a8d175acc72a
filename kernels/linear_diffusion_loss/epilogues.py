"""The losses of discrete diffusion, as epilogues of the kernel of rows: `rows.py` has their formulas and where they are
from.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.linear_cross_entropy.row_kernel import Loss, log1p, sigmoid, softplus

__all__ = ["LOSSES"]


@triton.jit
def _subs(scalars, w, v, masked, kept, real, lse, z_target, z_other, plain, gains, shares):
    slope = tl.where(masked, w, 0.0)
    return tl.where(masked, lse - z_target, 0.0), 0.0, slope, 0.0, 0.0, -slope, 0.0


@triton.jit
def _score_entropy_absorb(scalars, w, v, masked, kept, real, lse, z_target, z_other, plain, gains, shares):
    shift = tl.load(scalars) - tl.log(real.to(lse.dtype))
    scores = tl.exp(lse + shift)
    nats = tl.where(masked, scores - (z_target + shift) - 1, 0.0)
    ce = tl.where(masked, lse - z_target, 0.0)
    return nats, ce, tl.where(masked, w * scores + v, 0.0), 0.0, 0.0, tl.where(masked, -w - v, 0.0), 0.0


@triton.jit
def _score_entropy_uniform(scalars, w, v, masked, kept, real, lse, z_target, z_other, plain, gains, shares):
    rho, log_rho = tl.load(scalars), tl.load(scalars + 1)
    scores = tl.exp(lse)
    stayed = scores + rho * ((real - 1) * (log_rho - 1) - plain)
    # The clean token's three terms first: 1 / rho is large where its score should be.
    changed = scores - (plain - z_target) - (real - 2) - (log_rho + 1 + z_target) / rho
    bulk = tl.where(kept, rho, 1.0)
    w = w / real
    return tl.where(kept, stayed, changed) / real, 0.0, w * scores, -w * bulk, 0.0, w * (bulk - 1 / rho), 0.0


@triton.jit
def _d3pm_absorb_zero_mask(scalars, w, v, masked, kept, real, lse, z_target, z_other, plain, gains, shares):
    share = tl.load(scalars)
    ce = lse - z_target
    return share * ce, ce, share * w + v, 0.0, 0.0, -share * w - v, 0.0


@triton.jit
def _d3pm_absorb(scalars, w, v, masked, kept, real, lse, z_target, z_other, plain, gains, shares):
    share, rest = tl.load(scalars), tl.load(scalars + 1)
    p_mask = tl.exp(z_other - lse)
    a, b = tl.load(scalars + 2) * p_mask, tl.load(scalars + 3) * p_mask
    ce = lse - z_target
    at_target = -share * w - v
    at_mask = (b / (1 + b) - rest * a / (1 + a)) * w
    return log1p(b) + share * ce - rest * log1p(a), ce, -at_target - at_mask, 0.0, 0.0, at_target, at_mask


@triton.jit
def _d3pm_uniform(scalars, w, v, masked, kept, real, lse, z_target, z_other, plain, gains, shares):
    q_target, q_state = tl.load(scalars), tl.load(scalars + 1)
    q_rest, log_odds = tl.load(scalars + 2), tl.load(scalars + 3)
    constant, b = tl.load(scalars + 4), tl.load(scalars + 5)
    floor, first = tl.load(scalars + 6), tl.load(scalars + 7) != 0
    log_target, log_state = z_target - lse, z_other - lse
    gain_target, gain_state = softplus(log_target + log_odds), softplus(log_state + log_odds)
    expected = q_rest * (gains - gain_target - tl.where(kept, 0.0, gain_state)) + q_state * gain_state
    expected += tl.where(first, log_target, q_target * gain_target)
    p_state = b * tl.exp(log_state)
    nats = tl.log(p_state + floor) + constant - expected

    share_target = tl.where(first, 1.0, sigmoid(log_target + log_odds))
    share_state = sigmoid(log_state + log_odds)
    at_state = (tl.where(kept, 0.0, q_rest - q_state) * share_state + p_state / (p_state + floor)) * w
    at_target = (tl.where(first, 0.0, q_rest) - q_target) * share_target * w - v
    of_share = -q_rest * w
    return nats, -log_target, -(of_share * shares + at_target + at_state), 0.0, of_share, at_target, at_state


LOSSES = {
    "subs": Loss(_subs, by_mask=True, without_other=True),
    "sedd_absorb": Loss(_score_entropy_absorb, by_mask=True, without_other=True),
    "sedd_uniform": Loss(_score_entropy_uniform, without_other=True, needs_sum=True),
    "d3pm_absorb": Loss(_d3pm_absorb, by_mask=True),
    "d3pm_absorb_zero_mask": Loss(_d3pm_absorb_zero_mask, by_mask=True, without_other=True),
    "d3pm_uniform": Loss(_d3pm_uniform, log_odds=3),
}
