"""BD3-LM (Arriola et al. 2025, arXiv:2503.09573): masked diffusion inside blocks, autoregression across them.

    -log p(x)  <=  sum over blocks b of  NELBO(x^b | x^{<b})

Each block has a time of its own, and one pass sees noisy blocks beside the clean text. The row's first token, which is
given, belongs to the first block. B rows, L positions, N blocks, M gathered positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from adapters.base import LossTerm
from adapters.diffusion import masked
from adapters.diffusion.adapter import DiffusionAdapter
from adapters.diffusion.clipping import ClipSearch, clipped_count
from adapters.diffusion.mdl import MDLProcess
from adapters.diffusion.network import Network, RowLoss, Rows
from adapters.diffusion.otherwise import Level, Levels, cross_entropy, over_log_odds
from adapters.diffusion.process import Draw, Process, Window
from adapters.diffusion.schedules import AlphaSchedule
from adapters.diffusion.scores import AbsorbingGraph, reveal_by_scores
from models.bd3lm import is_whole

__all__ = ["BD3LMAdapter", "BD3LMProcess", "block_of"]

SMALLEST_U = 1e-3  # where the bound over time of a time-conditioned network begins


def block_of(length: int, size: int) -> Tensor:
    """(L,) block of each position: blocks of `size`, the first one with the given token before it."""
    return (torch.arange(length) - 1).clamp_min(0) // size


class BD3LMProcess(MDLProcess):
    """The masking probability is u = t, per block. Training may draw it from a part of (0, 1], `clip`, which lowers
    the variance of the gradient and is no bound any more; evaluation never does."""

    def __init__(self, cfg: Any, n: int, V: int, mask_id: int | None) -> None:
        Process.__init__(self, cfg, n, V, mask_id)
        self.schedule = AlphaSchedule("loglinear", alpha_min=0.0)
        self.mode, self.size = "subs", cfg.block_length
        self.last_u = 1.0
        # A block of one token is masked for certain: its cross-entropy does not depend on the time.
        self.exact = self.size == 1 and not cfg.time_conditioning
        self.clip = (cfg.sampling_eps_min, cfg.sampling_eps_max)
        self.search: ClipSearch | None = None
        kind = "exact mask counts" if not cfg.time_conditioning else f"u in [{SMALLEST_U:g}, 1] and both ends"
        self.estimator = "exact" if self.exact else f"the bound of blocks of {self.size} with {kind}"

    @property
    def gap_notes(self) -> tuple[str, ...]:
        return (
            f"a gap is filled from the text before it and in its own block of {self.size} tokens, not from later text",
        )

    @property
    def chunk(self) -> int:
        return max(1, self.cfg.n_ctx // 2 // self.size) * self.size

    def time_streams(self, length: int) -> int:
        return int(block_of(length, self.size)[-1]) + 1

    def noise_width(self, length: int) -> int:
        """One more number per block, for the number of masks in it."""
        return length + self.time_streams(length)

    def per_position(self, values: Tensor, length: int) -> Tensor:
        return values[:, block_of(length, self.size)]

    def extra(self, x0: Tensor) -> dict[str, Tensor]:
        return {"clean": x0, "blocks": block_of(x0.shape[1], self.size)}

    def shared(self, network: Network, x0: Tensor, doc_ids: Tensor | None) -> dict[str, Any]:
        """The clean text goes through the network once for all draws."""
        blocks = block_of(x0.shape[1], self.size).to(network.device)
        ids = None if doc_ids is None else doc_ids.to(network.device)
        return {"clean": network.model.read(x0.to(network.device), ids, blocks), "blocks": blocks}

    def read(self, network: Network, x0: Tensor, doc_ids: Tensor) -> Tensor:
        """As the clean text of a row is read, at time 0: a token sees its own block and the blocks before it."""
        device = network.device
        blocks = block_of(x0.shape[1], self.size).to(device)
        return network.model.clean_states(x0.to(device), doc_ids.to(device), blocks)

    # -- corruption and objective ------------------------------------------------------------------------------

    @property
    def trains_on_bound(self) -> bool:
        """Under clipping the training loss is no bound, and is not called one."""
        return self.size == 1 or (not self.cfg.clip_search and is_whole(self.clip))

    def training_time(self, r: Tensor) -> Tensor:
        if self.size == 1:
            return torch.ones_like(r)
        low, high = self.clip
        return low + (high - low) * r

    def corrupt(self, x0: Tensor, noised: Tensor, time: Tensor, u: Tensor) -> Tensor:
        """Masks with probability `time` (B, N) per block; with `resample_masks` and a clip, given that the masked
        fraction of each block lies within the clip, as if drawn again until it does."""
        length = x0.shape[1]
        if not self.cfg.resample_masks or is_whole(self.clip) or self.size == 1:
            chosen = noised & (u[:, :length] < self.per_position(time, length))
        else:
            counts = self._block_sums(noised)
            chosen = self._choose(
                noised, clipped_count(counts, time, u[:, length:], self.clip), u[:, :length]
            )
        return x0.masked_fill(chosen, self.mask)

    def _block_sums(self, values: Tensor) -> Tensor:
        """(B, L) -> (B, N) fp64."""
        length = values.shape[1]
        sums = torch.zeros(len(values), self.time_streams(length), dtype=torch.float64)
        return sums.index_add_(1, block_of(length, self.size), values.double())

    def _choose(self, candidates: Tensor, k: Tensor, u: Tensor) -> Tensor:
        """(B, L) bool: in each block, the k (B, N) candidates with the smallest u."""
        blocks = block_of(candidates.shape[1], self.size)
        key = blocks + torch.where(candidates, u, 1 + u) / 2  # by block; in a block, candidates first
        rank = key.argsort(1).argsort(1) - torch.searchsorted(blocks, blocks)
        return candidates & (rank < self.per_position(k, candidates.shape[1]))

    def tau(self, time: Tensor) -> Tensor:
        return self.schedule.sigma(time).float()  # (B, N), expanded in rows and hidden

    def network_tau(self, time: Tensor, length: int) -> Tensor:
        return self.per_position(self.tau(time), length)

    def rows(self, x0: Tensor, xt: Tensor, noised: Tensor, time: Tensor) -> Rows:
        weights = self.per_position(1 / time, x0.shape[1])
        return Rows.of(noised & (xt == self.mask), x0, xt, {"weights": weights})

    def terms(self, network: Network, hidden: Tensor, loss: RowLoss, rows: Rows) -> dict[str, LossTerm]:
        if self.trains_on_bound:
            return {"nelbo": LossTerm(loss.sum, "tokens")}
        return {"clipped_loss": LossTerm(loss.sum, "tokens", likelihood=False)}

    # -- bound ---------------------------------------------------------------------------------------------------

    def estimate(self, draw: Draw) -> dict[str, Tensor]:
        if self.cfg.time_conditioning:
            return self._over_time(draw)
        length = draw.x0.shape[1]
        counts = self._block_sums(draw.noised)  # (B, N)
        k = ((draw.r * counts).floor().clamp_max(counts - 1) + 1).clamp_min(1)
        chosen = self._choose(draw.noised, k, draw.u[:, :length])
        nats = self._block_nats(draw, draw.x0.masked_fill(chosen, self.mask), torch.ones_like(draw.r))
        if self.search is not None:
            self.search.add(k, counts, nats)
        # The released code's weights, as in `mdl`, with u in [1e-3, 1].
        share = 1 - masked.binomial_tail(counts.flatten(), SMALLEST_U, k.flatten()).view_as(k)
        total = counts / k * nats
        found = {"diffusion": total.sum(1), "paper": (total * share / (1 - SMALLEST_U)).sum(1)}
        return {**found, "per_token": nats} if self.exact else found

    def _over_time(self, draw: Draw) -> dict[str, Tensor]:
        t = SMALLEST_U + (1 - SMALLEST_U) * draw.r
        length, clean_end = draw.x0.shape[1], torch.full_like(draw.r, SMALLEST_U)
        xt = self._mask(draw, t, draw.u[:, :length])
        nats = self._block_nats(draw, xt, t)
        if self.search is not None:
            self.search.add(self._block_sums(xt != draw.x0), self._block_sums(draw.noised), nats)
        integrand = (nats / t).sum(1)
        recon = self._block_nats(draw, self._mask(draw, clean_end, draw.u_recon[:, :length]), clean_end).sum(
            1
        )
        return {"diffusion": (1 - SMALLEST_U) * integrand, "recon": recon, "paper": integrand}

    def _mask(self, draw: Draw, time: Tensor, u: Tensor) -> Tensor:
        chosen = draw.noised & (u < self.per_position(time, draw.x0.shape[1]))
        return draw.x0.masked_fill(chosen, self.mask)

    def _block_nats(self, draw: Draw, xt: Tensor, time: Tensor) -> Tensor:
        """(B, N) cross-entropy at masked positions, summed over each block, unweighted."""
        length = draw.x0.shape[1]
        ones = {"weights": torch.ones(xt.shape, dtype=torch.float64)}
        rows = Rows.of(draw.noised & (xt == self.mask), draw.x0, xt, ones)
        rows = rows.to(draw.network.device, draw.network.dtype)
        hidden = draw.hidden(xt, self.network_tau(time, length), rows)
        nats = torch.zeros(xt.numel(), dtype=torch.float64)
        nats[rows.index.cpu()] = draw.network.loss(hidden, rows, "subs").nats.double().cpu()
        return self._block_sums(nats.view_as(xt))

    def levels(self) -> Levels:
        """As `mdl`, within a block."""
        if not self.cfg.time_conditioning:
            how = "block by block, in exact counts of masks"
            return Levels(self._levels_of_counts(), torch.zeros_like, how)
        over = over_log_odds(lambda t: t, SMALLEST_U)
        nodes = [Level(t, cross_entropy(self.mask, weight), u) for t, u, weight in over]
        nodes.append(Level(SMALLEST_U, cross_entropy(self.mask, 1.0), SMALLEST_U))
        how = f"block by block, at {len(over)} times of a quadrature, and at the clean end"
        return Levels(nodes, torch.zeros_like, how)

    def noised_together(self, noised: Tensor) -> list[Tensor]:
        blocks, places = block_of(len(noised), self.size), noised.nonzero().squeeze(1)
        return [places[blocks[places] == block] for block in blocks[places].unique()]

    # -- sampling --------------------------------------------------------------------------------------------------

    def resolve(self, network: Network, window: Window) -> Iterator[Tensor]:
        """Block by block from left to right. A finished block is run once more, clean, to keep its keys and values.
        Known text is conditioned on if it stands in an earlier block or in the same one."""
        x = window.x.masked_fill(window.unknown, self.mask)
        blocks = block_of(x.shape[1], self.size)
        state = _Prefix(network, self.cfg.kv_cache and window.sampling.use_cache, rows=len(x))
        for block in range(int(blocks[-1]) + 1):
            here = blocks == block
            part = replace(
                window,
                x=x[:, here],
                unknown=window.unknown[:, here],
                noise=window.noise.child(f"block {block}"),
            )
            if bool(part.unknown.any()):
                for inside in self._resolve_block(network, part, state):
                    x = x.clone()
                    x[:, here] = inside
                    yield x
            state.store(x[:, here])

    def _resolve_block(self, network: Network, part: Window, state: _Prefix) -> Iterator[Tensor]:
        cfg, steps = self.cfg, part.sampling.steps or self.cfg.num_sampling_steps

        def at_mask_probability(u: Tensor, x: Tensor, index: Tensor) -> Tensor:
            sigma = self.schedule.sigma(u.double())
            return state.hidden(x, sigma, index)

        if part.sampling.by_confidence:
            return masked.reveal_by_confidence(self, network, part, steps, at_mask_probability)
        if cfg.sampler == "first_hitting":
            return masked.first_hitting(self, network, part, at_mask_probability)
        times = masked.grid_times(steps, "sample" if cfg.sampler == "analytic" else cfg.final_step)
        if cfg.sampler == "analytic":
            sigma, step = self.schedule.sigma(times), AbsorbingGraph(self.mask).analytic
            plan = list(zip(sigma[:-1].tolist(), [step] * steps, (-sigma.diff()).tolist(), strict=True))
            return reveal_by_scores(self, self, state, part, plan)

        def at_step(i: int, x: Tensor, index: Tensor) -> Tensor:
            sigma = self.schedule.sigma(times[min(i, steps)]).expand(len(x))
            return state.hidden(x, sigma, index)

        stay = (times[1:] / times[:-1]).tolist()
        return masked.reveal_on_grid(
            self,
            network,
            part,
            stay,
            at_step,
            lazy=cfg.sampler == "ancestral_cache" and part.sampling.use_cache,
        )


class _Prefix(Network):
    """A network that reads one block behind the finished ones. Without `cached`, these are run again every time."""

    def __init__(self, network: Network, cached: bool, rows: int) -> None:
        super().__init__(network.model, network.kernels)
        self.network, self.cached, self.rows = network, cached, rows
        self.finished: list[Tensor] = []  # clean blocks
        self.cache = self._new_cache()

    def _new_cache(self) -> Any:
        return self.model.init_cache(self.rows)

    def _run(self, x: Tensor, tau: Tensor, store: bool) -> Tensor:
        self.network.calls += 1
        one_block = torch.zeros(x.shape[1], dtype=torch.int64, device=self.device)
        tokens, tau = x.to(self.device), tau.to(self.device, torch.float32)
        return self.model(tokens, tau, cache=self.cache, blocks=one_block, store=store)

    def store(self, x: Tensor) -> None:
        """Add a finished block (B, T)."""
        self.finished.append(x)
        if self.cached:
            self._run(x, torch.zeros(len(x)), store=True)

    def hidden(self, xt: Tensor, tau: Tensor, index: Tensor, **extra: Any) -> Tensor:
        if not self.cached:
            self.cache = self._new_cache()
            for block in self.finished:
                self._run(block, torch.zeros(len(block)), store=True)
        return self._run(xt, tau, store=False).flatten(0, 1).index_select(0, index.to(self.device))


class BD3LMAdapter(DiffusionAdapter):
    """Holds the range that masking probabilities are drawn from, and looks for a better one after each evaluation.

    Steps are prepared ahead of time, so a range found at a step applies from `AHEAD` steps later; until then the one
    before it stays in force. Both live in a buffer of the model, so that a resumed run prepares the very same steps.
    """

    process_class = BD3LMProcess
    fitted = MappingProxyType({"clip_plan": "run"})
    AHEAD = 16

    def __init__(self, model: Any, model_cfg: Any, tokenizer: Any) -> None:
        super().__init__(model, model_cfg, tokenizer)
        cfg = self.model_cfg
        self.search: ClipSearch | None = None
        if cfg.clip_search and cfg.block_length > 1:
            self.search = ClipSearch(cfg.block_length, cfg.clip_ranges(), cfg.resample_masks)
        self._plan: tuple[int, list[int]] = (-1, [])  # version of the buffer, its content
        if self.search:
            # low, high; next low, high, its first step. In twentieths, so that no rounding moves a limit; -1: none.
            model.register_buffer("clip_plan", torch.empty(5, dtype=torch.int64))

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        if self.search:
            self.model.clip_plan.copy_(torch.tensor([-1, -1, -1, -1, 0]))

    def make_process(self) -> Process:
        process = super().make_process()
        process.search = self.search  # type: ignore[attr-defined]
        return process

    def plan(self) -> list[int]:
        """The buffer on the host; read again only after it has changed."""
        buffer = self.model.clip_plan
        if self._plan[0] != buffer._version:
            self._plan = buffer._version, buffer.tolist()
        return self._plan[1]

    def _range_at(self, step: int) -> tuple[int, int]:
        low, high, next_low, next_high, first = self.plan()
        return (next_low, next_high) if step >= first else (low, high)

    def clip_at(self, step: int) -> tuple[float, float]:
        """The range that training step `step` draws masking probabilities from."""
        cfg, found = self.model_cfg, self._range_at(step)
        return (cfg.sampling_eps_min, cfg.sampling_eps_max) if found[0] < 0 else cfg.clip_of(*found)

    @property
    def scored_together(self) -> int:
        return self.model_cfg.block_length

    def process_at(self, step: int) -> Process:
        if not self.search:
            return self.process
        process = copy.copy(self.process)
        process.clip = self.clip_at(step)  # type: ignore[attr-defined]
        return process

    def on_evaluation_start(self) -> None:
        super().on_evaluation_start()
        if self.search:
            self.search.take()

    def after_evaluation(self, step: int) -> None:
        if not self.search:
            return
        found = self.search.best(self.add_up(self.search.take()))  # each process has scored rows of its own
        # A range that waits for its first step stays planned: steps may have been prepared with it.
        waiting = step < self.plan()[4] <= step + self.AHEAD
        if found is None or waiting:
            return
        self.model.clip_plan.copy_(torch.tensor([*self._range_at(step), *found, step + self.AHEAD]))
