"""SEDD (Lou et al. 2024, arXiv:2310.16834): a network that learns the ratios p_t(y) / p_t(x) of single-token edits.

The loss is the denoising score entropy, whose value, weighted by the rate sigma'(t), is the integrand of a likelihood
bound. The network's output is a log-score; on the absorbing graph in units of 1/((e^sigma - 1) n), so that a zero
output is a uniform prediction. B rows, L positions, M gathered positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapters.base import LossTerm
from adapters.diffusion import masked
from adapters.diffusion.adapter import DiffusionAdapter
from adapters.diffusion.likelihood import REPLICATES
from adapters.diffusion.network import Network, RowLoss, Rows, sampling_dtype
from adapters.diffusion.otherwise import Level, Levels, Nats, cross_entropy, over_log_odds
from adapters.diffusion.process import Draw, Process, Window
from adapters.diffusion.schedules import AlphaSchedule, Geometric, Schedule
from adapters.diffusion.scores import AbsorbingGraph, Step, UniformGraph, reveal_by_scores

__all__ = ["SEDDAdapter", "SEDDProcess"]

CLEAN_END = 1e-5  # where the sampler's grid ends, before the final denoising
RECON_FLOOR = 1e-6  # share of the uniform law in the reconstruction of the uniform graph


class SEDDProcess(Process):
    """Times are fp64 in (0, 1]."""

    def __init__(self, cfg: Any, n: int, V: int, mask_id: int | None) -> None:
        super().__init__(cfg, n, V, mask_id)
        self.schedule: Schedule = (
            AlphaSchedule("loglinear", cfg.noise_eps, 1.0)
            if cfg.noise_schedule == "loglinear"
            else Geometric(cfg.sigma_min, cfg.sigma_max)
        )
        self.graph: AbsorbingGraph | UniformGraph = (
            AbsorbingGraph(mask_id) if mask_id is not None else UniformGraph(n)
        )
        self.mode = "sedd_absorb" if mask_id is not None else "sedd_uniform"
        span = f"t in [{cfg.sampling_eps:g}, 1]"
        self.estimator = f"the score-entropy bound ({cfg.transition_type}) over {span}, with both ends"

    @property
    def stratified(self) -> bool:  # type: ignore[override]
        return self.cfg.use_low_discrepancy_sampler

    @property
    def sampler_steps(self) -> int:
        return self.cfg.sampling_timesteps

    # -- corruption and objective ------------------------------------------------------------------------------

    def training_time(self, r: Tensor) -> Tensor:
        eps = self.cfg.sampling_eps
        return (1 - eps) * r + eps

    def corrupt(self, x0: Tensor, noised: Tensor, time: Tensor, u: Tensor) -> Tensor:
        jumped = self.schedule.mask_probability(time)  # 1 - e^-sigma, of either graph
        if self.mask_id is not None:
            return x0.masked_fill(noised & (u < jumped), self.mask_id)
        anywhere = (u / jumped * self.n).long().clamp_max(self.n - 1)
        return torch.where(noised & (u < jumped), anywhere, x0)

    def tau(self, time: Tensor) -> Tensor:
        return self.schedule.sigma(time).float().squeeze(1)

    def rows(self, x0: Tensor, xt: Tensor, noised: Tensor, time: Tensor) -> Rows:
        """Absorbing: the kernel's loss is in units of r = 1/(e^sigma - 1), and sigma' r = w(t)."""
        if self.mask_id is None:
            per_position = {"weights": self.schedule.rate(time), "sigma_bar": self.schedule.sigma(time)}
            return Rows.of(noised, x0, xt, per_position)
        per_position = {"weights": self.schedule.weight(time)}
        if not self.cfg.scaled:
            per_position["shift"] = math.log(self.n) + torch.expm1(self.schedule.sigma(time)).log()
        return Rows.of(noised & (xt == self.mask_id), x0, xt, per_position)

    def row_loss(self, network: Network, hidden: Tensor, rows: Rows) -> RowLoss:
        if self.cfg.lm_loss_weight == 0:
            return network.loss(hidden, rows, self.mode)
        scaled = Rows(rows.index, rows.x0, rows.xt, self.cfg.se_loss_weight * rows.weights, rows.coefficients)
        return network.loss(hidden, scaled, self.mode, torch.full_like(rows.weights, self.cfg.lm_loss_weight))

    def terms(self, network: Network, hidden: Tensor, loss: RowLoss, rows: Rows) -> dict[str, LossTerm]:
        """The cross-entropy is of the clean token at masked positions: the denoising one, no next-token loss."""
        if loss.aux is None:
            return {"nelbo": LossTerm(loss.sum, "tokens", self.cfg.se_loss_weight)}
        return {
            "nelbo": LossTerm(self.bound_nats(loss, rows).sum(), "tokens", 0.0),
            "objective": LossTerm(loss.sum, "tokens"),
            "cross_entropy": LossTerm(loss.aux.sum(), "tokens", 0.0),
        }

    @torch.no_grad()
    def statistics(self, network: Network, hidden: Tensor, loss: RowLoss, rows: Rows) -> dict[str, Tensor]:
        """Z = sum_y exp(z_y)/n, 1 where the scores are those of some distribution of the clean token. Recovered from
        the loss Z - z_x0 + log n - 1 and the clean token's own logit."""
        if self.mask_id is None:
            return {}
        head = network.model.head_weight[rows.x0].to(loss.nats.dtype)
        own = (hidden.to(loss.nats.dtype) * head).sum(1) + network.model.head_bias[rows.x0].to(
            loss.nats.dtype
        )
        if "shift" in rows.coefficients:
            own = own + rows.coefficients["shift"].to(own.dtype)
        return {"score_total": (loss.nats + own - math.log(self.n) + 1).sum()}

    # -- bound -----------------------------------------------------------------------------------------------------

    def estimate(self, draw: Draw) -> dict[str, Tensor]:
        eps = self.cfg.sampling_eps
        t = eps + (1 - eps) * draw.r
        xt = self.corrupt(draw.x0, draw.noised, t, draw.u)
        rows = self.rows(draw.x0, xt, draw.noised, t).to(draw.network.device, draw.network.dtype)
        loss = draw.network.loss(draw.hidden(xt, self.tau(t), rows), rows, self.mode)
        integrand = draw.by_row(rows, self.bound_nats(loss, rows))
        return {
            "diffusion": (1 - eps) * integrand,
            "recon": self._reconstruction(draw, torch.full_like(t, eps)),
            "prior": draw.counts * self.prior_nats(),
            "paper": integrand,
        }

    def prior_nats(self) -> float:
        """Nats per token of KL(q(x_1 | x_0) || p(x_1)): what has survived until t = 1."""
        end = torch.ones((), dtype=torch.float64)
        kept, n = float(self.schedule.alpha(end)), self.n
        if self.mask_id is not None:
            return kept * math.log(n)
        own, other = kept + (1 - kept) / n, (1 - kept) / n
        return own * math.log(n * own) + (n - 1) * other * math.log(n * other)

    def _reconstruction(self, draw: Draw, time: Tensor) -> Tensor:
        """(B,) -log of the final denoising step's law at the clean tokens, from noise at the clean end."""
        xt = self.corrupt(draw.x0, draw.noised, time, draw.u_recon)
        ones = {"weights": torch.ones_like(time)}
        chosen = draw.noised if self.mask_id is None else draw.noised & (xt == self.mask_id)
        rows = Rows.of(chosen, draw.x0, xt, ones).to(draw.network.device, draw.network.dtype)
        hidden = draw.hidden(xt, self.tau(time), rows)
        if self.mask_id is not None:  # scores without the mask's, normalised: a softmax
            return draw.by_row(rows, draw.network.loss(hidden, rows, "subs").nats)
        sigma = float(self.schedule.sigma(time)[0, 0]) if len(time) else 0.0
        return draw.by_row(rows, self._uniform_reconstruction(draw.network, hidden, rows, sigma))

    def _uniform_reconstruction(self, network: Network, hidden: Tensor, rows: Rows, sigma: float) -> Tensor:
        """(M,) nats. The step's law is clipped at 0, which can hit the clean token where scores are off; mixing in a
        millionth of the uniform law keeps it a distribution and the bound finite."""
        device, _ = sampling_dtype(network.device)
        nats = torch.empty(len(hidden), dtype=torch.float64)
        for chosen, logits in network.logits(hidden):
            now = rows.xt[chosen].to(device)
            p = self.graph.analytic(self.log_scores(logits, now, sigma), now, sigma)
            p = (1 - RECON_FLOOR) * p / p.sum(1, keepdim=True) + RECON_FLOOR / self.n
            nats[chosen] = -p.gather(1, rows.x0[chosen].to(device).unsqueeze(1)).squeeze(1).log().cpu()
        return nats

    def levels(self) -> Levels:
        """Absorbing: sigma' dt = (e^sigma - 1) d log u, with u = 1 - e^-sigma the probability of a mask. Uniform:
        sigma' dt = sigma d log sigma, and a jump, of probability u, goes anywhere."""
        eps, nodes = self.cfg.sampling_eps, []
        clean = torch.tensor(eps, dtype=torch.float64)
        u_clean = float(self.schedule.mask_probability(clean))
        if self.mask_id is not None:
            over = over_log_odds(self.schedule.mask_probability, eps)
            nodes = [Level(t, self._masked_entropy(u, weight), u) for t, u, weight in over]
            nodes.append(Level(eps, cross_entropy(self.mask, 1.0), u_clean))
            left = float(1 - self.schedule.mask_probability(torch.ones((), dtype=torch.float64)))
            left *= math.log(self.n)
        else:
            over = over_log_odds(self.schedule.sigma, eps)
            for t, sigma, weight in over:
                u = -math.expm1(-sigma)
                nats = self._uniform_entropy(u, sigma * weight)
                nodes.append(Level(t, nats, noise=partial(_anywhere, u, self.n)))
            sigma = float(self.schedule.sigma(clean))
            nodes.append(Level(eps, self._last_step(sigma), noise=partial(_anywhere, u_clean, self.n)))
            left = self.prior_nats()
        drawn = "" if self.mask_id is not None else "the definition, with noise of its own, "
        how = f"{drawn}at {len(over)} times of a quadrature, and at both ends"
        return Levels(nodes, lambda x0: torch.full(x0.shape, left, dtype=torch.float64), how)

    def _masked_entropy(self, u: float, weight: float) -> Nats:
        """Denoising score entropy at a mask: sum over tokens of s_y - r log s_x0 + r (log r - 1), r the true ratio."""
        r = (1 - u) / u

        def nats(logits: Tensor, x0: Tensor, xt: Tensor) -> Tensor:
            log_s = logits + math.log(r / self.n) if self.cfg.scaled else logits
            total = log_s.exp().sum(1) - log_s[:, self.mask].exp()
            own = log_s.gather(1, x0.unsqueeze(1)).squeeze(1)
            return weight / r * (total - r * own + r * (math.log(r) - 1))

        return nats

    def _uniform_entropy(self, u: float, weight: float) -> Nats:
        """The same over all tokens but the present one, of ratios q(y | x_0) / q(x_t | x_0)."""
        n = self.n

        def nats(logits: Tensor, x0: Tensor, xt: Tensor) -> Tensor:
            q = torch.full_like(logits, u / n).scatter(1, x0.unsqueeze(1), 1 - u + u / n)
            ratio = q / q.gather(1, xt.unsqueeze(1))
            each = logits.exp() - ratio * logits + ratio * (ratio.log() - 1)
            return weight / n * each.scatter(1, xt.unsqueeze(1), 0.0).sum(1)

        return nats

    def _last_step(self, sigma: float) -> Nats:
        """-log of the law that the final denoising step draws from."""

        def nats(logits: Tensor, x0: Tensor, xt: Tensor) -> Tensor:
            p = self.graph.analytic(self.log_scores(logits, xt, sigma), xt, sigma)
            p = (1 - RECON_FLOOR) * p / p.sum(1, keepdim=True) + RECON_FLOOR / self.n
            return -p.gather(1, x0.unsqueeze(1)).squeeze(1).log()

        return nats

    # -- sampling --------------------------------------------------------------------------------------------------

    def log_scores(self, logits: Tensor, now: Tensor, sigma: float) -> Tensor:
        """(M, V) log s, 0 at the present token."""
        if self.mask_id is not None and self.cfg.scaled:
            logits = logits - math.log(math.expm1(sigma)) - math.log(self.n)
        return logits.scatter(1, now.unsqueeze(1), 0.0)

    def resolve(self, network: Network, window: Window) -> Iterator[Tensor]:
        cfg, steps = self.cfg, window.sampling.steps or self.cfg.sampling_timesteps
        if window.sampling.by_confidence:
            most = float(self.schedule.mask_probability(torch.ones((), dtype=torch.float64)))
            return masked.reveal_by_confidence(
                self, network, window, steps, masked.at_mask_probability(network, most)
            )
        times = torch.linspace(1, CLEAN_END, steps + 1, dtype=torch.float64)
        sigma = self.schedule.sigma(times)
        step: Step = self.graph.analytic if cfg.predictor == "analytic" else self.graph.euler
        if cfg.predictor == "analytic":
            amounts = sigma[:-1] - sigma[1:]
        else:
            amounts = (times[:-1] - times[1:]) * self.schedule.rate(times[:-1])
        plan = [(s, step, a) for s, a in zip(sigma[:-1].tolist(), amounts.tolist(), strict=True)]
        plan.append((float(sigma[-1]), self.graph.analytic, float(sigma[-1])))
        return reveal_by_scores(self, self, network, window, plan, cfg.final_step == "argmax")


def _anywhere(u: float, n: int, x0: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens (M,) that jumped to any of `n` with probability u."""
    jumped = torch.rand(x0.shape, dtype=torch.float64, generator=generator) < u
    return torch.where(jumped, torch.randint(n, x0.shape, generator=generator), x0)


class SEDDAdapter(DiffusionAdapter):
    process_class = SEDDProcess

    @property
    def draws(self) -> int:
        """`nelbo_draws`, or the paper's number of times per sequence (appendix C.6), as whole replicates."""
        cfg = self.model_cfg
        return cfg.nelbo_draws or -(-cfg.num_timesteps // REPLICATES) * REPLICATES
