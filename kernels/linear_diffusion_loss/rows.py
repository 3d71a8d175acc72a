"""What one row of logits contributes to a diffusion bound, and the gradient: one small class per process.

A row is one position of one sequence. Rows come in chunks; the chunk's logits z (r, V), in at least fp32, are
overwritten, in the end by the gradient of `weights . nats + aux_weights . aux` with respect to them.

Shapes: M rows, r rows of a chunk, V states, n real tokens; p = softmax(z), m the mask state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import chunks
from kernels.chunks import Rows, States

__all__ = ["MODES", "Mode"]


class Mode(chunks.Mode, Protocol):
    """Rows have `ids` (x0, xt), and as `scalars` what `prepare` made."""

    names: tuple[str, ...]  # coefficients that must be given, (M,) each
    optional: tuple[str, ...]
    needs_mask: bool
    has_aux: bool

    def prepare(
        self, x0: Tensor, xt: Tensor, given: Mapping[str, Tensor], states: States
    ) -> tuple[Tensor, ...]:
        """Per-row scalars (M,), in the dtype of the coefficients: differences of survival probabilities
        deserve fp64."""


def _at(z: Tensor, ids: Tensor) -> Tensor:
    return z.gather(1, ids[:, None]).squeeze(1)


def _is_mask(ids: Tensor, states: States) -> Tensor:
    assert states.mask_id is not None
    return torch.eq(ids, states.mask_id)


def _add_at(z: Tensor, ids: Tensor, values: Tensor) -> None:
    z.scatter_add_(1, ids[:, None], values[:, None])


class Subs:
    """Masked diffusion: cross-entropy of the clean token, the mask having no probability, at masked positions
    (Sahoo et al. 2024, equation 10 and section 3.2.3). An unmasked position is known: 0."""

    names: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    needs_mask, has_aux = True, False

    def prepare(
        self, x0: Tensor, xt: Tensor, given: Mapping[str, Tensor], states: States
    ) -> tuple[Tensor, ...]:
        return ()

    def rows(self, z: Tensor, rows: Rows, states: States, gradient: bool) -> tuple[Tensor, Tensor | None]:
        x0, xt = rows.ids
        masked = _is_mask(xt, states)
        z[:, states.mask_id] = -torch.inf
        lse = z.logsumexp(1)
        nats = torch.where(masked, lse - _at(z, x0), 0.0)
        if gradient:
            slope = torch.where(masked, rows.weights, 0.0)
            z.sub_(lse[:, None]).exp_().mul_(slope[:, None])
            _add_at(z, x0, -slope)
        return nats, None


class ScoreEntropyAbsorb:
    """Denoising score entropy of the absorbing graph (Lou et al. 2024, equation 10 and appendix C.1) at
    masked positions, in units of r = p(x0 | x0) / p(m | x0). With log-scores z + log r - log n, `(sum_y s_y -
    r log s_x0 + r (log r - 1)) / r = exp(LSE_{y != m} z - log n) - z_x0 + log n - 1`.

    Coefficient `shift` (optional) is added to all logits of a row: log n - log r, if z are log-scores
    already. aux: cross-entropy of softmax over the real tokens, at masked positions."""

    names: tuple[str, ...] = ()
    optional: tuple[str, ...] = ("shift",)
    needs_mask, has_aux = True, True

    def prepare(
        self, x0: Tensor, xt: Tensor, given: Mapping[str, Tensor], states: States
    ) -> tuple[Tensor, ...]:
        return (given.get("shift", torch.zeros_like(x0, dtype=torch.float32)),)

    def rows(self, z: Tensor, rows: Rows, states: States, gradient: bool) -> tuple[Tensor, Tensor | None]:
        x0, xt = rows.ids
        (shift,) = rows.scalars
        masked = _is_mask(xt, states)
        z[:, states.mask_id] = -torch.inf
        z.add_((shift - math.log(states.n))[:, None])
        lse, z_x0 = z.logsumexp(1), _at(z, x0)
        nats = torch.where(masked, lse.exp() - z_x0 - 1, 0.0)
        ce = None if rows.aux_weights is None else torch.where(masked, lse - z_x0, 0.0)
        if gradient:
            slope, pull = rows.weights, rows.weights
            if rows.aux_weights is not None:
                slope = slope + rows.aux_weights * (-lse).exp()
                pull = pull + rows.aux_weights
            z.exp_().mul_(torch.where(masked, slope, 0.0)[:, None])
            _add_at(z, x0, torch.where(masked, -pull, 0.0))
        return nats, ce


class ScoreEntropyUniform:
    """Denoising score entropy of the uniform graph with rate 1/N, log-scores z (Lou et al. 2024, equation 10
    and appendix C.1): `(1/N) sum_{y != x} s_y - r_y log s_y + r_y (log r_y - 1)`. With rho = p(y | x0) / p(x0
    | x0), r_y is rho if x is still the clean token, else 1/rho for the clean token and 1 for the others.

    Coefficient `sigma_bar`: total noise.
    """

    names: tuple[str, ...] = ("sigma_bar",)
    optional: tuple[str, ...] = ()
    needs_mask, has_aux = False, False

    def prepare(
        self, x0: Tensor, xt: Tensor, given: Mapping[str, Tensor], states: States
    ) -> tuple[Tensor, ...]:
        grown = torch.expm1(given["sigma_bar"])
        return grown / (states.n + grown), grown.log() - (states.n + grown).log()

    def rows(self, z: Tensor, rows: Rows, states: States, gradient: bool) -> tuple[Tensor, Tensor | None]:
        x0, xt = rows.ids
        rho, log_rho = rows.scalars
        kept = x0 == xt
        z_x0 = _at(z, x0)
        sum_log = z.sum(1) - _at(z, xt)  # over y != x
        z.scatter_(1, xt[:, None], -torch.inf)
        scores = z.exp_()  # 0 at x
        total = scores.sum(1)
        N = states.n
        stayed = total + rho * ((N - 1) * (log_rho - 1) - sum_log)
        # The clean token's three terms first: 1/rho is large where its score should be.
        changed = total - (sum_log - z_x0) - (N - 2) - (log_rho + 1 + z_x0) / rho
        nats = torch.where(kept, stayed, changed) / N
        if gradient:
            bulk = torch.where(kept, rho, 1.0)
            scores.sub_(bulk[:, None])
            _add_at(scores, x0, bulk - 1 / rho)
            scores.scatter_(1, xt[:, None], 0.0)
            scores.mul_((rows.weights / N)[:, None])
        return nats, None


class D3PMAbsorb:
    """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) of the absorbing chain under the x0-parameterisation
    (Austin et al. 2021, equations 3 and 4): 0 where x_t is not the mask, else, with w = (a - b) / (1 - b),
    `log1p(b p_m / (1 - b)) - w log p_x0 - (1 - w) log1p(a p_m / (1 - a))`. At t = 1, where w = 1, this is
    -log p(x0 | x1).

    Coefficients `a`, `b`: survival probabilities up to t - 1 and t; `first`: t == 1 (bool).
    `zero_mask`: the network gives the mask no probability, whatever its logit; then the loss is -w log p_x0.
    aux: cross-entropy over all states, at every position.
    """

    names: tuple[str, ...] = ("a", "b", "first")
    optional: tuple[str, ...] = ()
    needs_mask, has_aux = True, True

    def __init__(self, zero_mask: bool = False) -> None:
        self.zero_mask = zero_mask

    def prepare(
        self, x0: Tensor, xt: Tensor, given: Mapping[str, Tensor], states: States
    ) -> tuple[Tensor, ...]:
        first, masked = given["first"].bool(), _is_mask(xt, states)
        # Rows that score 0 get harmless numbers: a or b may be 1 there.
        a = torch.where(first | ~masked, 0.0, given["a"])
        b = torch.where(masked, given["b"], 0.0)
        w = torch.where(masked, torch.where(first, 1.0, (a - b) / (1 - b)), 0.0)
        v = torch.where(first | ~masked, 0.0, (1 - a) / (1 - b))  # 1 - w
        return w, v, a / (1 - a), b / (1 - b)

    def rows(self, z: Tensor, rows: Rows, states: States, gradient: bool) -> tuple[Tensor, Tensor | None]:
        x0, _ = rows.ids
        w, v, odds_a, odds_b = rows.scalars
        if self.zero_mask:
            z[:, states.mask_id] = -torch.inf
        log_p = z.sub_(z.logsumexp(1)[:, None])
        log_x0, p_m = _at(log_p, x0), log_p[:, states.mask_id].exp()
        nats = torch.log1p(odds_b * p_m) - w * log_x0 - v * torch.log1p(odds_a * p_m)
        if gradient:
            # c = d / d log p, not zero at x0 and m; through the softmax: c - p sum(c)
            c_x0 = -w * rows.weights if rows.aux_weights is None else -w * rows.weights - rows.aux_weights
            c_m = odds_b * p_m / (1 + odds_b * p_m) - v * odds_a * p_m / (1 + odds_a * p_m)
            c_m = c_m * rows.weights
            log_p.exp_().mul_(-(c_x0 + c_m)[:, None])
            _add_at(log_p, x0, c_x0)
            log_p[:, states.mask_id] += c_m
        return nats, None if rows.aux_weights is None else -log_x0


class D3PMUniform:
    """The same KL for the uniform chain of K = n states. With e = (1 - a) / K, odds = a / e, Z_p = b p_xt +
    (1 - b) / K, Z_q likewise for x0, and the posterior q over x_{t-1}, which is a constant outside {x0, x_t},
    `log(Z_p / Z_q) + q_x0 log1p(odds) - sum_j q_j log1p(odds p_j)`. At t = 1 it is -log p(x0 | x1).

    Coefficients `a`, `b` as for absorbing, `beta`: noise of step t, `first`: t == 1 (bool).
    aux: cross-entropy at every position.
    """

    names: tuple[str, ...] = ("a", "b", "beta", "first")
    optional: tuple[str, ...] = ()
    needs_mask, has_aux = False, True

    def prepare(
        self, x0: Tensor, xt: Tensor, given: Mapping[str, Tensor], states: States
    ) -> tuple[Tensor, ...]:
        a, b, beta, first = (given[name] for name in self.names)
        first, kept, K = first.bool(), x0 == xt, states.n
        a = torch.where(first, 0.5, a)  # the branch of t == 1 does not use it; 1 would give infinities
        e, rest = (1 - a) / K, beta / K
        at_xt = torch.where(kept, 1 - beta, 0.0)
        Z_q = torch.where(kept, b, 0.0) + (1 - b) / K
        q_x0 = torch.where(first, 1.0, (at_xt + rest) * (a + e) / Z_q)
        q_xt = torch.where(kept | first, 0.0, (1 - beta + rest) * e / Z_q)
        q_other = torch.where(first, 0.0, rest * e / Z_q)
        log_odds = a.log() - e.log()
        at_x0 = q_x0 * F.softplus(log_odds, threshold=50.0)
        constant = torch.where(first, 0.0, at_x0) - Z_q.log()
        return q_x0, q_xt, q_other, log_odds, constant, b, (1 - b) / K, first.to(a.dtype)

    def rows(self, z: Tensor, rows: Rows, states: States, gradient: bool) -> tuple[Tensor, Tensor | None]:
        x0, xt = rows.ids
        q_x0, q_xt, q_other, log_odds, constant, b, floor, first = rows.scalars
        kept, first = x0 == xt, first.bool()
        log_p = z.sub_(z.logsumexp(1)[:, None])
        log_x0, p_xt = _at(log_p, x0), _at(log_p, xt).exp()
        argument = log_p + log_odds[:, None]  # log(odds p_j)
        gains = F.softplus(argument, threshold=50.0)
        all_gains, gain_x0, gain_xt = gains.sum(1), _at(gains, x0), _at(gains, xt)
        del gains
        expected = q_other * (all_gains - gain_x0 - torch.where(kept, 0.0, gain_xt)) + q_xt * gain_xt
        expected = expected + torch.where(first, log_x0, q_x0 * gain_x0)
        Z_p = b * p_xt + floor
        nats = Z_p.log() + constant - expected
        if gradient:
            share = argument.sigmoid_()  # a p_j / (a p_j + e)
            share_x0 = torch.where(first, 1.0, _at(share, x0))
            extra_xt = torch.where(kept, 0.0, q_other - q_xt) * _at(share, xt) + b * p_xt / Z_p
            c = share.mul_((-q_other * rows.weights)[:, None])
            _add_at(c, xt, extra_xt * rows.weights)
            _add_at(c, x0, (torch.where(first, 0.0, q_other) - q_x0) * share_x0 * rows.weights)
            if rows.aux_weights is not None:
                _add_at(c, x0, -rows.aux_weights)
            total = c.sum(1)
            log_p.exp_().mul_(-total[:, None]).add_(c)
        return nats, None if rows.aux_weights is None else -log_x0


MODES: dict[str, Mode] = {
    "subs": Subs(),
    "sedd_absorb": ScoreEntropyAbsorb(),
    "sedd_uniform": ScoreEntropyUniform(),
    "d3pm_absorb": D3PMAbsorb(),
    "d3pm_absorb_zero_mask": D3PMAbsorb(zero_mask=True),
    "d3pm_uniform": D3PMUniform(),
}
