"""MDLM (Sahoo et al. 2024, arXiv:2406.07524): masking, and a network whose output respects two known facts.

A clean token is never the mask, and an unmasked token is already known (SUBS). The bound becomes a cross-entropy at
masked positions, weighted by w(t) = -alpha'/(1 - alpha):

    -log p(x)  <=  E_t  w(t)  sum over masked positions of  -log p(x_i | z_t)

B rows, L positions, M gathered positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.diffusion import masked
from adapters.diffusion.adapter import DiffusionAdapter
from adapters.diffusion.chains import AbsorbingChain
from adapters.diffusion.network import Network, RowLoss, Rows
from adapters.diffusion.otherwise import Level, Levels, absorbing_kl, cross_entropy, gauss, over_log_odds
from adapters.diffusion.process import Draw, Process, Window
from adapters.diffusion.reverse import ancestral_step
from adapters.diffusion.schedules import AlphaSchedule, Geometric, LinearSigma, Schedule
from adapters.diffusion.scores import AbsorbingGraph, reveal_by_scores

__all__ = ["MDLAdapter", "MDLProcess", "build_schedule"]


def build_schedule(cfg: Any) -> Schedule:
    """`alpha_type` with its end points."""
    if cfg.alpha_type == "geometric":
        return Geometric(cfg.sigma_min, cfg.sigma_max)
    if cfg.alpha_type == "linear_sigma":
        return LinearSigma(cfg.sigma_min, cfg.sigma_max)
    return AlphaSchedule(cfg.alpha_type, cfg.alpha_min, cfg.alpha_max)


class MDLProcess(Process):
    """Times are fp64 in (0, 1], on the grid 1/T, ..., 1 where `continuous_time` is off."""

    def __init__(self, cfg: Any, n: int, V: int, mask_id: int | None) -> None:
        super().__init__(cfg, n, V, mask_id)
        self.schedule = build_schedule(cfg)
        self.mode = "subs" if cfg.use_subs_parameterization else "d3pm_absorb"
        start, end = self._mask_probability(0.0), self._mask_probability(1.0)
        self.first_u, self.last_u = start, end
        self.exact_count = cfg.continuous_time and not cfg.time_conditioning and cfg.use_subs_parameterization
        if self.exact_count:
            self.estimator = "the any-order bound with exact mask counts"
        elif cfg.continuous_time:
            self.estimator = f"the masked bound over t in [{cfg.sampling_eps:g}, 1], with both ends"
        else:
            self.estimator = f"the masked bound of {cfg.num_timesteps} steps, with both ends"

    @property
    def stratified(self) -> bool:  # type: ignore[override]
        return self.cfg.use_low_discrepancy_sampler

    @property
    def chunk(self) -> int:
        return self.cfg.sar_chunk

    @property
    def sampler_steps(self) -> int:
        return 0 if self.cfg.sampler == "first_hitting" else self.cfg.num_sampling_steps

    def _mask_probability(self, t: float) -> float:
        return float(self.schedule.mask_probability(torch.tensor(t, dtype=torch.float64)))

    # -- corruption and objective ------------------------------------------------------------------------------

    def training_time(self, r: Tensor) -> Tensor:
        if self.cfg.continuous_time:
            return (1 - self.cfg.sampling_eps) * r + self.cfg.sampling_eps
        steps = self.cfg.num_timesteps  # each of them: a bound leaves none out
        return (((r * steps).floor() + 1) / steps).clamp_max(1)

    def corrupt(self, x0: Tensor, noised: Tensor, time: Tensor, u: Tensor) -> Tensor:
        return x0.masked_fill(noised & (u < self.schedule.mask_probability(time)), self.mask)

    def tau(self, time: Tensor) -> Tensor:
        return self.schedule.sigma(time).float().squeeze(1)

    def weight(self, time: Tensor) -> Tensor:
        """w(t), or T times a step's (alpha_s - alpha_t)/(1 - alpha_t) in discrete time."""
        if self.cfg.continuous_time:
            return self.schedule.weight(time)
        if not self.cfg.use_subs_parameterization:
            return torch.full_like(time, self.cfg.num_timesteps)
        u_s, u_t = self._step_ends(time)
        return self.cfg.num_timesteps * (u_t - u_s) / u_t

    def _step_ends(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Mask probabilities at s = t - 1/T and t."""
        s = (time - 1 / self.cfg.num_timesteps).clamp_min(0)
        s = torch.where(s < 1e-9, 0.0, s)  # 1/T - 1/T is not always 0 in fp64
        return self.schedule.mask_probability(s), self.schedule.mask_probability(time)

    def rows(self, x0: Tensor, xt: Tensor, noised: Tensor, time: Tensor) -> Rows:
        per_position = {"weights": self.weight(time)}
        if self.mode == "d3pm_absorb":
            u_s, u_t = self._step_ends(time)
            per_position |= {"a": 1 - u_s, "b": 1 - u_t, "first": u_s == 0}
        return Rows.of(noised & (xt == self.mask), x0, xt, per_position)

    def row_loss(self, network: Network, hidden: Tensor, rows: Rows) -> RowLoss:
        return network.loss(hidden, rows, self.mode)

    # -- bound ---------------------------------------------------------------------------------------------------

    def estimate(self, draw: Draw) -> dict[str, Tensor]:
        return self._exact_count(draw) if self.exact_count else self._over_time(draw)

    def _exact_count(self, draw: Draw) -> dict[str, Tensor]:
        """(N/k) sum of cross-entropies with exactly k of N positions masked, k uniform: the mean over all orders of
        the autoregressive loss, nothing left out at either end (Ou et al. 2024; Nie et al. 2025, LLaDA).

        The released code's integral over t in [eps, 1] is the same sum with other weights on k:
        (1/k)(I_u1 - I_u0)(k, N - k + 1) / (1 - eps), I the regularised incomplete beta function.
        """
        n = draw.counts
        k = (draw.r.squeeze(1) * n).floor().clamp_max(n - 1) + 1
        xt = draw.x0.masked_fill(masked.choose_exactly(draw.noised, k, draw.u), self.mask)
        nats = self._cross_entropy(draw, xt, torch.ones_like(draw.r))
        k = k.clamp_min(1)
        eps = self.cfg.sampling_eps
        u0 = self._mask_probability(eps)
        share = masked.binomial_tail(n, self.last_u, k) - masked.binomial_tail(n, u0, k)
        return {"diffusion": n / k * nats, "paper": n / k * nats * share / (1 - eps)}

    def _over_time(self, draw: Draw) -> dict[str, Tensor]:
        cfg, eps = self.cfg, self.cfg.sampling_eps
        if cfg.continuous_time:
            t, clean_end, length = eps + (1 - eps) * draw.r, torch.full_like(draw.r, eps), 1 - eps
        else:
            steps = cfg.num_timesteps
            t, clean_end, length = ((draw.r * steps).floor() + 1) / steps, torch.zeros_like(draw.r), 1.0
        xt = self.corrupt(draw.x0, draw.noised, t, draw.u)
        rows = self.rows(draw.x0, xt, draw.noised, t).to(draw.network.device, draw.network.dtype)
        loss = self.row_loss(draw.network, draw.hidden(xt, self.tau(t), rows), rows)
        integrand = draw.by_row(rows, self.bound_nats(loss, rows))
        recon = torch.zeros_like(integrand)
        if bool((self.schedule.mask_probability(clean_end) > 0).all()):
            recon = self._cross_entropy(
                draw, self.corrupt(draw.x0, draw.noised, clean_end, draw.u_recon), clean_end
            )
        prior = draw.counts * (1 - self.last_u) * math.log(self.n)
        return {"diffusion": length * integrand, "recon": recon, "prior": prior, "paper": integrand}

    def _cross_entropy(self, draw: Draw, xt: Tensor, time: Tensor) -> Tensor:
        """(B,) summed over the masked positions, unweighted."""
        per_position = {"weights": torch.ones_like(time)}
        rows = Rows.of(draw.noised & (xt == self.mask), draw.x0, xt, per_position)
        rows = rows.to(draw.network.device, draw.network.dtype)
        return draw.by_row(rows, draw.network.loss(draw.hidden(xt, self.tau(time), rows), rows, "subs").nats)

    def levels(self) -> Levels:
        """The integral over log u of u^k (1 - u)^(N - k), k masks among N; or the steps."""
        cfg, nodes, ends = self.cfg, [], ""
        if self.exact_count:
            return Levels(self._levels_of_counts(), torch.zeros_like, "in exact counts of masks")
        if cfg.continuous_time:
            over = over_log_odds(self.schedule.mask_probability, cfg.sampling_eps)
            nodes = [Level(t, cross_entropy(self.mask, weight), u) for t, u, weight in over]
            clean, ends = cfg.sampling_eps, f"at {len(over)} times of a quadrature, and at both ends"
        else:
            reached = [self._mask_probability(t / cfg.num_timesteps) for t in range(cfg.num_timesteps + 1)]
            for t in range(1, cfg.num_timesteps + 1):
                u_s, u_t = reached[t - 1], reached[t]
                nats = (
                    cross_entropy(self.mask, (u_t - u_s) / u_t)
                    if cfg.use_subs_parameterization
                    else absorbing_kl(self.mask, (1 - u_s, 1 - u_t), False, False, False)
                )
                nodes.append(Level(t / cfg.num_timesteps, nats, u_t))
            clean, ends = 0.0, f"at all {cfg.num_timesteps} steps, and at both ends"
        if u := self._mask_probability(clean):
            nodes.append(Level(clean, cross_entropy(self.mask, 1.0), u))
        left = (1 - self.last_u) * math.log(self.n)
        return Levels(nodes, lambda x0: torch.full(x0.shape, left, dtype=torch.float64), ends)

    def _levels_of_counts(self) -> list[Level]:
        """A polynomial in u of no more than the window's degree: this rule is exact up to 15."""
        return [Level(1.0, cross_entropy(self.mask, w / u), u) for u, w in gauss(0.0, 1.0, 8)]

    # -- sampling --------------------------------------------------------------------------------------------------

    def resolve(self, network: Network, window: Window) -> Iterator[Tensor]:
        cfg, steps = self.cfg, window.sampling.steps or self.cfg.num_sampling_steps
        if window.sampling.by_confidence:
            return masked.reveal_by_confidence(
                self, network, window, steps, masked.at_mask_probability(network, self.last_u)
            )
        if cfg.sampler == "first_hitting":
            return masked.first_hitting(
                self, network, window, masked.at_mask_probability(network, self.last_u)
            )
        times = masked.grid_times(steps, "sample" if cfg.sampler == "analytic" else cfg.final_step)
        if not cfg.use_subs_parameterization:
            return self._ancestral_with_mask(network, window, times)
        if cfg.sampler == "analytic":
            sigma = self.schedule.sigma(times)
            step = AbsorbingGraph(self.mask).analytic
            plan = list(zip(sigma[:-1].tolist(), [step] * steps, (-sigma.diff()).tolist(), strict=True))
            return reveal_by_scores(self, self, network, window, plan)
        u = self.schedule.mask_probability(times)
        stay = (u[1:] / u[:-1]).tolist()

        def denoise(i: int, x: Tensor, index: Tensor) -> Tensor:
            t = times[min(i, steps)].expand(len(x), 1)
            return network.hidden(x, self.tau(t), index)

        return masked.reveal_on_grid(
            self,
            network,
            window,
            stay,
            denoise,
            lazy=cfg.sampler == "ancestral_cache" and window.sampling.use_cache,
        )

    def log_scores(self, logits: Tensor, now: Tensor, sigma: float) -> Tensor:
        """A prediction read as scores (appendix B of the paper): s_y = alpha/(1 - alpha) p(y) at masked positions."""
        return (self.clean_log_probs(logits) - math.log(math.expm1(sigma))).scatter(1, now.unsqueeze(1), 0.0)

    def _ancestral_with_mask(self, network: Network, window: Window, times: Tensor) -> Iterator[Tensor]:
        """Without SUBS the prediction may be the mask itself: D3PM's reverse step on this schedule."""
        clock = times.flip(0)
        alpha = self.schedule.alpha(clock)  # at steps 0, ..., S
        if alpha[0] < 1:  # one more step, from what is masked at time 0 to clean text
            clock, alpha = F.pad(clock, (1, 0)), F.pad(alpha, (1, 0), value=1.0)
        chain = AbsorbingChain(self.V, 1 - alpha[1:] / alpha[:-1], self.mask)
        x, length = window.x.masked_fill(window.unknown, self.mask), window.x.shape[1]
        for t in range(len(clock) - 1, 0, -1):
            index = (x == self.mask).flatten().nonzero().squeeze(1)
            if not len(index):
                return
            tau = self.tau(clock[t].expand(len(x), 1))
            hidden = network.hidden(x, tau, index)
            u = window.noise.uniform(f"step {t}", length).flatten()[index]
            now = x.flatten()[index]
            drawn = ancestral_step(chain, network, hidden, now, (t - 1, t), u, window.sampling, self.cfg)
            x = x.flatten().index_put((index,), drawn).view_as(x)
            yield x


class MDLAdapter(DiffusionAdapter):
    process_class = MDLProcess
