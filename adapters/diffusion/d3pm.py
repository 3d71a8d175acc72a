"""D3PM (Austin et al. 2021, arXiv:2107.03006): a chain of T steps, its exact posterior, and the bound by Bayes' rule.

The network predicts p(x_0 | x_t); equation 4 turns that into the reverse step with the chain's own matrices:

    p(x_s = j | x_t = i)  ~  [Q_{s..t}]_ji  [p(x_0 | x_t) Qbar_s]_j

which holds for any s < t, so that sampling and bounds may skip steps. M positions, K states.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.base import LossTerm
from adapters.diffusion import masked
from adapters.diffusion.adapter import DiffusionAdapter
from adapters.diffusion.chains import AbsorbingChain, Chain, GaussianChain, SpectralChain, UniformChain
from adapters.diffusion.mutual_information import (
    exponents,
    lost_information_spectral,
    lost_information_uniform,
)
from adapters.diffusion.neighbors import balance, generator_matrix, load_embedding, neighbor_graph, spectrum
from adapters.diffusion.network import Network, RowLoss, Rows
from adapters.diffusion.otherwise import Level, Levels, Nats, absorbing_kl
from adapters.diffusion.process import Draw, Process, Sampling, Window
from adapters.diffusion.reverse import NEVER, ancestral_step, reverse_kl
from adapters.diffusion.schedules import absorbing_mutual_info_betas, cosine_betas, linear_betas
from naming import not_one_of

if TYPE_CHECKING:
    from data.store import TokenStore

__all__ = [
    "D3PMAdapter",
    "D3PMProcess",
    "build_chain",
    "needs_unigram",
]

LARGEST_BETA = 1 - 1e-6  # exp(a R) reaches beta = 1 at no finite a


# -- the chain of a configuration ------------------------------------------------------------------------------


def needs_unigram(cfg: Any) -> bool:
    """Whether the schedule is fitted to the training text's token frequencies."""
    return cfg.noise_schedule == "mutual_info" and cfg.transition_type != "absorbing"


def build_chain(cfg: Any, states: int, mask_id: int | None, unigram: Tensor | None = None) -> Chain:
    """The chain of a `D3PMConfig`. `unigram` (K,): token frequencies, where `needs_unigram`."""
    kind = cfg.transition_type
    if kind in ("gaussian", "nearest_neighbor") and states > cfg.dense_state_limit:
        raise ValueError(
            f"model_cfg.transition_type={kind} keeps {states} x {states} tables, and model_cfg.dense_state_limit is "
            f"{cfg.dense_state_limit}. Use a smaller tokenizer, or transition_type=absorbing or uniform"
        )
    if needs_unigram(cfg) and unigram is None:
        raise ValueError(
            f"the mutual_info schedule of a {kind} chain needs the token frequencies of the text"
        )
    if kind not in _BUILDERS:
        raise ValueError(f"model_cfg.transition_type: {not_one_of(kind, _BUILDERS)}")
    return _BUILDERS[kind](cfg, states, mask_id, unigram)


def _betas(cfg: Any) -> Tensor:
    if cfg.noise_schedule == "cosine":
        return cosine_betas(cfg.num_timesteps)
    if cfg.noise_schedule == "linear":
        gaussian = cfg.transition_type == "gaussian"
        low = cfg.gaussian_beta_min if gaussian else cfg.linear_beta_min
        high = cfg.gaussian_beta_max if gaussian else cfg.linear_beta_max
        return linear_betas(cfg.num_timesteps, low, high)
    raise ValueError(
        f"model_cfg.noise_schedule={cfg.noise_schedule} is not defined for transition_type={cfg.transition_type}"
        f"{' with nn_construction=' + cfg.nn_construction if cfg.transition_type == 'nearest_neighbor' else ''}. "
        f"Use cosine or linear"
    )


def _absorbing(cfg: Any, states: int, mask_id: int | None, unigram: Tensor | None) -> Chain:
    steps = cfg.num_timesteps
    betas = absorbing_mutual_info_betas(steps) if cfg.noise_schedule == "mutual_info" else _betas(cfg)
    assert mask_id is not None
    return AbsorbingChain(states, betas, mask_id)


def _uniform(cfg: Any, states: int, mask_id: int | None, unigram: Tensor | None) -> Chain:
    if unigram is None or cfg.noise_schedule != "mutual_info":
        return UniformChain(states, _betas(cfg))
    total = exponents(lambda e: lost_information_uniform(unigram, e), cfg.num_timesteps)
    return UniformChain(states, -torch.expm1(-total.diff()))


def _gaussian(cfg: Any, states: int, mask_id: int | None, unigram: Tensor | None) -> Chain:
    return GaussianChain(states, _betas(cfg))


def _nearest_neighbor(cfg: Any, states: int, mask_id: int | None, unigram: Tensor | None) -> Chain:
    graph = neighbor_graph(load_embedding(cfg.nn_embedding_path, states), cfg.nearest_neighbors)
    if cfg.nn_construction == "sinkhorn":
        return SpectralChain(spectrum(balance(graph), _betas(cfg), "sinkhorn"))
    matrix = generator_matrix(graph, cfg.nearest_neighbors)
    if unigram is not None and cfg.noise_schedule == "mutual_info":
        lost = lost_information_spectral(unigram, *torch.linalg.eigh(matrix))
        amounts = exponents(lost, cfg.num_timesteps).diff()
    else:
        amounts = -torch.log1p(-_betas(cfg).clamp_max(LARGEST_BETA))
    return SpectralChain(spectrum(matrix, amounts, cfg.nn_construction))


_BUILDERS = {
    "absorbing": _absorbing,
    "uniform": _uniform,
    "gaussian": _gaussian,
    "nearest_neighbor": _nearest_neighbor,
}


# -- two ways to compute the same loss ---------------------------------------------------------------------------


class _Fused:
    """Closed-form KL inside the fused loss: absorbing and uniform chains, equation 4."""

    kernel = "linear_diffusion_loss"

    def __init__(self, chain: AbsorbingChain | UniformChain, mode: str) -> None:
        self.chain, self.mode = chain, mode

    def coefficients(self, s: Tensor, t: Tensor) -> dict[str, Tensor]:
        values = {"a": self.chain.alpha_bar[s], "b": self.chain.alpha_bar[t], "first": s == 0}
        if self.mode == "d3pm_uniform":
            values["beta"] = 1 - self.chain.survival(s, t)
        return values

    def loss(self, network: Network, hidden: Tensor, rows: Rows, aux_weight: float) -> RowLoss:
        return network.loss(hidden, rows, self.mode, aux_weight)


class _Dense:
    """The definition on logits, for chains and parameterisations without a closed form."""

    kernel = "linear_function_loss"

    def __init__(self, chain: Chain, cfg: Any) -> None:
        self.chain, self.cfg = chain, cfg
        self._moved: dict[torch.device, Chain] = {}

    def chain_on(self, device: torch.device) -> Chain:
        if device not in self._moved:
            self._moved[device] = self.chain.to(device)
        return self._moved[device]

    def coefficients(self, s: Tensor, t: Tensor) -> dict[str, Tensor]:
        return {"s": s, "t": t}

    def loss(self, network: Network, hidden: Tensor, rows: Rows, aux_weight: float) -> RowLoss:
        """In fp64 where the device has it: at early steps a chain's rows differ from one-hot ones by what fp32 rounds
        away in a product with its eigenvectors."""
        chain = self.chain_on(hidden.device)
        dtype = torch.float32 if hidden.device.type == "mps" else torch.float64

        def row_nats(logits: Tensor, chosen: slice) -> tuple[Tensor, Tensor]:
            if self.cfg.zero_mask_logit and chain.mask_id is not None:
                is_mask = torch.arange(logits.shape[1], device=logits.device).eq(chain.mask_id)
                logits = logits.masked_fill(is_mask, NEVER)
            log_p = logits.to(dtype).log_softmax(1)
            x0, xt = rows.x0[chosen], rows.xt[chosen]
            s, t = rows.coefficients["s"][chosen], rows.coefficients["t"][chosen]
            cross_entropy = -log_p.gather(1, x0.unsqueeze(1)).squeeze(1)
            kl = reverse_kl(chain, log_p, x0, xt, s, t, self.cfg.reverse_param)
            if self.cfg.l0_mode == "x0":
                last = s == 0 if chain.mask_id is None else (s == 0) & (xt == chain.mask_id)
                kl = torch.where(last, cross_entropy, kl)
            return kl.to(logits.dtype), cross_entropy.to(logits.dtype)

        return network.loss_of_logits(hidden, rows.weights, row_nats, aux_weight)


# -- the process -------------------------------------------------------------------------------------------------


class D3PMProcess(Process):
    """Times are int64 steps t = 1..T."""

    def __init__(self, cfg: Any, n: int, V: int, mask_id: int | None, unigram: Tensor | None = None) -> None:
        super().__init__(cfg, n, V, mask_id)
        self.chain = build_chain(cfg, V, mask_id, unigram)
        self.steps = cfg.num_timesteps
        self.objective = self._objective()
        self.kernel = self.objective.kernel
        bound_steps = cfg.nelbo_steps or self.steps
        self.bound_grid = even_grid(self.steps, bound_steps)
        self.estimator = f"the {bound_steps}-step bound of {cfg.transition_type} D3PM, prior included"

    def _objective(self) -> _Fused | _Dense:
        cfg, chain = self.cfg, self.chain
        plain = cfg.reverse_param == "joint" and cfg.l0_mode == "posterior"
        if isinstance(chain, AbsorbingChain) and plain:
            return _Fused(chain, "d3pm_absorb_zero_mask" if cfg.zero_mask_logit else "d3pm_absorb")
        if isinstance(chain, UniformChain) and plain:
            return _Fused(chain, "d3pm_uniform")
        return _Dense(chain, cfg)

    @property
    def sampler_steps(self) -> int:
        return self.cfg.sampling_timesteps

    def check(self, sampling: Sampling) -> None:
        super().check(sampling)
        even_grid(self.steps, sampling.steps or self.cfg.sampling_timesteps)

    def training_time(self, r: Tensor) -> Tensor:
        return (r * self.steps).long().clamp_max(self.steps - 1) + 1

    def corrupt(self, x0: Tensor, noised: Tensor, time: Tensor, u: Tensor) -> Tensor:
        xt = x0.clone()
        t = time.expand(x0.shape)[noised]
        xt[noised] = self.chain.sample(x0[noised], t, u[noised])
        return xt

    def progress(self, time: Tensor) -> Tensor:
        return time / self.steps

    def tau(self, time: Tensor) -> Tensor:
        return (1000 * time / self.steps).float().squeeze(1)

    def rows(self, x0: Tensor, xt: Tensor, noised: Tensor, time: Tensor) -> Rows:
        return self._rows(x0, xt, noised, time - 1, time, self.cfg.auxiliary_loss_weight > 0)

    def _rows(self, x0: Tensor, xt: Tensor, noised: Tensor, s: Tensor, t: Tensor, every: bool) -> Rows:
        """A position that an absorbing chain has left alone has no KL: only the cross-entropy reads it."""
        chosen = noised if every or self.mask_id is None else noised & (xt == self.mask_id)
        per_position = {
            "weights": torch.ones_like(t, dtype=torch.float64),
            **self.objective.coefficients(s, t),
        }
        return Rows.of(chosen, x0, xt, per_position)

    def row_loss(self, network: Network, hidden: Tensor, rows: Rows) -> RowLoss:
        return self.objective.loss(network, hidden, rows, self.cfg.auxiliary_loss_weight)

    def bound_nats(self, loss: RowLoss, rows: Rows) -> Tensor:
        return self.steps * loss.nats

    def terms(self, network: Network, hidden: Tensor, loss: RowLoss, rows: Rows) -> dict[str, LossTerm]:
        """The bound is T times the KL of one step. The objective is not: multiplying the KL alone would shrink the
        cross-entropy beside it."""
        terms = {"nelbo": LossTerm(self.bound_nats(loss, rows).sum(), "tokens", 0.0)}
        terms["objective"] = LossTerm(loss.sum, "tokens")
        if loss.aux is not None:
            terms["cross_entropy"] = LossTerm(loss.aux.sum(), "tokens", 0.0)
        return terms

    def estimate(self, draw: Draw) -> dict[str, Tensor]:
        """One step of the bound's grid, times the number of steps; stratified over all of it this is the whole sum."""
        steps = len(self.bound_grid) - 1
        stratum = (draw.r * steps).long().clamp_max(steps - 1)  # (B, 1)
        s, t = self.bound_grid[steps - stratum], self.bound_grid[steps - stratum - 1]
        xt = self.corrupt(draw.x0, draw.noised, t, draw.u)
        rows = self._rows(draw.x0, xt, draw.noised, s, t, False).to(draw.network.device, draw.network.dtype)
        hidden = draw.hidden(xt, self.tau(t), rows)
        diffusion = steps * draw.by_row(rows, self.objective.loss(draw.network, hidden, rows, 0.0).nats)
        prior = torch.zeros(draw.x0.shape, dtype=torch.float64)
        prior[draw.noised] = self.chain.prior_nats(draw.x0[draw.noised]).double()
        return {"diffusion": diffusion, "prior": prior.sum(1), "paper": diffusion}

    def levels(self) -> Levels:
        """The steps of the bound's grid: in closed form where noise is a mask, else by the chain's matrices."""
        cfg, nodes = self.cfg, []
        options = cfg.zero_mask_logit, cfg.reverse_param == "mixture", cfg.l0_mode == "x0"
        grid = self.bound_grid.flip(0).tolist()
        for s, t in zip(grid, grid[1:], strict=False):
            if isinstance(self.chain, AbsorbingChain):
                kept = float(self.chain.alpha_bar[s]), float(self.chain.alpha_bar[t])
                nodes.append(Level(t, absorbing_kl(self.mask, kept, *options), 1 - kept[1]))
            else:
                nodes.append(Level(t, self._kl_by_matrices(s, t), noise=partial(self._noisy, t)))
        drawn = "" if self.mask_id is not None else "by the chain's matrices, with noise of its own, "
        how = f"{drawn}at all {len(nodes)} steps of the bound, prior included"
        return Levels(nodes, lambda x0: self.chain.prior_nats(x0).double(), how)

    def _noisy(self, t: int, x0: Tensor, generator: torch.Generator) -> Tensor:
        law = self.chain.row(x0, torch.full_like(x0, t)).double()
        return torch.multinomial(law, 1, generator=generator).squeeze(1)

    def _kl_by_matrices(self, s: int, t: int) -> Nats:
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)), both as products of [Q_{s..t}] and [Qbar_s] that are normalised."""

        def nats(logits: Tensor, x0: Tensor, xt: Tensor) -> Tensor:
            p, at = logits.softmax(1), torch.full_like(xt, s)
            if s == 0 and self.cfg.l0_mode == "x0":
                return -p.gather(1, x0.unsqueeze(1)).squeeze(1).log()
            step = self.chain.column(xt, at, torch.full_like(xt, t)).double()  # (M, V) by x_s
            if self.cfg.reverse_param == "mixture":
                reach = self.chain.column(xt, torch.zeros_like(xt), torch.full_like(xt, t)).double()
                p = torch.where(reach > 0, p / reach, 0.0)
            q = step * self.chain.row(x0, at).double()
            r = step * self.chain.push(p.to(self.chain.dtype), at).double()
            q, r = q / q.sum(1, keepdim=True), r / r.sum(1, keepdim=True)
            return (torch.xlogy(q, q) - torch.xlogy(q, r)).sum(1)

        return nats

    # -- sampling --------------------------------------------------------------------------------------------------

    def resolve(self, network: Network, window: Window) -> Iterator[Tensor]:
        """Ancestral sampling over an even grid. On a chain with a mask, known text stays as it is, and the
        conditional is exact; on others it is noised as far as the rest at every step, an approximation."""
        sampling = window.sampling
        grid = even_grid(self.steps, sampling.steps or self.cfg.sampling_timesteps)
        if sampling.by_confidence:
            yield from masked.reveal_by_confidence(
                self, network, window, len(grid) - 1, self._at_mask_probability(network)
            )
            return
        noise, unknown, length = window.noise, window.unknown, window.x.shape[1]
        known = ~unknown
        known[:, 0] &= not self.cfg.ignore_bos
        x = window.x.clone()
        x[unknown] = self.chain.start(noise.uniform("start", length))[unknown]
        for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            if self.mask_id is None:
                x = self._noise_known(window, known, x, t)
            moving = unknown if self.mask_id is None else unknown & (x == self.mask_id)
            if not bool(moving.any()):
                return
            index = moving.flatten().nonzero().squeeze(1)
            tau = torch.full((len(x),), 1000 * t / self.steps)
            hidden = network.hidden(x, tau, index)
            u = noise.uniform(f"step {t}", length).flatten()[index]
            drawn = ancestral_step(
                self.chain,
                network,
                hidden,
                x.flatten()[index],
                (s, t),
                u,
                window.sampling,
                self.cfg,
                self.cfg.reverse_param,
                self.cfg.l0_mode == "x0",
                self.cfg.zero_mask_logit,
            )
            x = x.flatten().index_put((index,), drawn).view_as(x)
            if s == 0:
                x = torch.where(window.unknown, x, window.x)
            yield x

    def _at_mask_probability(self, network: Network) -> masked.Denoise:
        assert isinstance(self.chain, AbsorbingChain)
        reached = 1 - self.chain.alpha_bar  # (T+1,), rising

        def denoise(u: Tensor, x: Tensor, index: Tensor) -> Tensor:
            t = torch.searchsorted(reached, u.double()).clamp(1, self.steps)
            return network.hidden(x, self.tau(t.unsqueeze(1)), index)

        return denoise

    def _noise_known(self, window: Window, known: Tensor, x: Tensor, t: int) -> Tensor:
        u = window.noise.uniform(f"known {t}", x.shape[1])[known]
        text = window.x[known]
        noisy = x.clone()
        noisy[known] = self.chain.sample(text, torch.full_like(text, t), u)
        return noisy


def even_grid(steps: int, wanted: int) -> Tensor:
    """(S+1,) int64 from T down to 0 in S even skips."""
    if not 1 <= wanted <= steps:
        raise ValueError(f"steps: must be 1 to {steps} (model_cfg.num_timesteps), got {wanted}")
    return (torch.arange(wanted, -1, -1, dtype=torch.float64) * steps / wanted).round().long()


class D3PMAdapter(DiffusionAdapter):
    """Where the schedule is fitted to the text's token frequencies, these are kept beside the weights, so that a
    checkpoint brings its own schedule."""

    process_class = D3PMProcess
    fitted = MappingProxyType({"unigram": "text"})

    def __init__(self, model: Any, model_cfg: Any, tokenizer: Any) -> None:
        super().__init__(model, model_cfg, tokenizer)
        self._made_at = -1  # version of the frequencies that the process was made of
        if needs_unigram(model_cfg):
            model.register_buffer("unigram", torch.empty(model.V))

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        if needs_unigram(self.model_cfg):
            nn.init.constant_(self.model.unigram, 1 / self.model.V)

    def on_training_text(self, store: TokenStore) -> None:
        super().on_training_text(store)
        if needs_unigram(self.model_cfg):
            counts = torch.from_numpy(store.counts(self.model.V))
            counts[self.tokenizer.eot] += store.n_docs
            self.model.unigram.copy_(counts / counts.sum())

    @property
    def process(self) -> Process:
        """Made anew where the frequencies have changed, as weights bring theirs."""
        if needs_unigram(self.model_cfg) and self._made_at != (version := self.model.unigram._version):
            self._process, self._made_at = None, version
        return super().process

    def make_process(self) -> Process:
        unigram = self.model.unigram.double().cpu() if needs_unigram(self.model_cfg) else None
        return D3PMProcess(self.model_cfg, self.model.n, self.model.V, self.model.mask_id, unigram=unigram)
