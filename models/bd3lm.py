"""BD3-LM: diffusion inside blocks, autoregression across them (Arriola et al. 2025, arXiv:2503.09573)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from configs.schema import Execution, Free, OpenFraction, Positive
from kernels.attention import OnePass, Plan, Visible, attention_call
from kernels.attention.block_diffusion import cached_mask, one_pass_pairs
from models.dit import DiT, DiTConfig
from models.layers.cache import KVCache
from models.layers.flops import Flops
from models.mdl import Sampler, unread_by_sampler

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["WHOLE_FROM", "BD3LM", "BD3LMConfig", "is_whole"]

WHOLE_FROM = 1e-3  # a range of masking probabilities that begins here, or below, has no lower bound
TWENTIETHS = 20  # in which ranges are searched for


def is_whole(clip: tuple[float, float]) -> bool:
    """Whether a range of masking probabilities counts as all of (0, 1]."""
    return clip[0] <= WHOLE_FROM and clip[1] == 1.0


class BD3LMConfig(DiTConfig):
    """Masked diffusion with linear masking probability u = t; within a block everything is as in `mdl`."""

    time_conditioning: bool = False
    block_length: Positive = 16  # 4, 8 and 16 in the paper; 1 is autoregressive, the whole row is `mdl`
    sampling_eps_min: OpenFraction = 1e-3  # training draws masking probabilities from [min, max]
    sampling_eps_max: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip_search: bool = True  # at evaluations, look for the range with least variance
    resample_masks: bool = True  # redraw masks until the masked fraction lies in the range
    use_low_discrepancy_sampler: Free[bool] = True  # times stratified over the blocks of a step
    num_sampling_steps: Free[Positive] = 1000  # per block, of the samplers that have steps
    sampler: Free[Sampler] = "first_hitting"
    kv_cache: Execution[bool] = True  # sampling keeps the keys and values of finished blocks

    tiny = {"block_length": 8, "num_sampling_steps": 8}
    examples = {
        "resample_masks": (False, {"sampling_eps_min": 0.4, "sampling_eps_max": 0.6}),
        "num_sampling_steps": (4, {"sampler": "ancestral"}),
    }
    rare = {"final_step": "of the positions of a block one in 100,000 is masked at t = 1e-5"}

    @property
    def share_of_logits(self) -> float:
        """A block of one token is masked for certain; others with probabilities from the range training begins with."""
        return 1.0 if self.block_length == 1 else (self.sampling_eps_min + self.sampling_eps_max) / 2

    def clip_of(self, low: int, high: int) -> tuple[float, float]:
        """A range in twentieths as masking probabilities, within `sampling_eps_min` and `sampling_eps_max`."""
        return max(low / TWENTIETHS, self.sampling_eps_min), min(high / TWENTIETHS, self.sampling_eps_max)

    def clip_ranges(self) -> dict[tuple[int, int], tuple[float, float]]:
        """What `clip_search` chooses from: ranges in twentieths of widths 0.5, 0.55, ..., 0.9 -> `clip_of`. The limits
        cut less than a twentieth off at either end."""
        found = {}
        for width in range(TWENTIETHS // 2, TWENTIETHS * 9 // 10 + 1):
            for low in range(TWENTIETHS - width + 1):
                begin, end = self.clip_of(low, low + width)
                cut = max(begin - low / TWENTIETHS, (low + width) / TWENTIETHS - end)
                if cut < 0.999 / TWENTIETHS and self._trains((begin, end)):
                    found[low, low + width] = begin, end
        return found

    def _trains(self, clip: tuple[float, float]) -> bool:
        """Whether a block may have a mask at all, if its masked fraction must not exceed the range. One token has."""
        size = self.block_length
        return not self.resample_masks or size == 1 or clip[1] * size >= 1 - 1e-9

    def unread(self) -> dict[str, str]:
        found = unread_by_sampler(self.sampler)
        if self.block_length == 1:  # a block of one token is masked for certain
            fields = ("sampling_eps_min", "sampling_eps_max", "clip_search", "resample_masks", "nelbo_draws")
            found |= dict.fromkeys(fields, "block_length=1")
        elif self.clip_search and not self.clip_ranges():
            found["clip_search"] = f"sampling_eps_max={self.sampling_eps_max}"
        elif not self.clip_search and is_whole((self.sampling_eps_min, self.sampling_eps_max)):
            found["resample_masks"] = "sampling_eps_max=1.0"
        return found

    def problems(self, run: RunConfig) -> list[str]:
        problems = super().problems(run)
        if self.block_length > self.n_ctx:
            problems.append(
                f"model_cfg.block_length ({self.block_length}) must be at most model_cfg.n_ctx ({self.n_ctx}); "
                f"nearest: {self.n_ctx}"
            )
            return problems
        if self.sampling_eps_min >= self.sampling_eps_max:
            problems.append(
                f"model_cfg.sampling_eps_min ({self.sampling_eps_min}) must be below "
                f"model_cfg.sampling_eps_max ({self.sampling_eps_max})"
            )
        elif not self._trains((self.sampling_eps_min, self.sampling_eps_max)):
            problems.append(
                f"model_cfg.sampling_eps_max ({self.sampling_eps_max}) leaves no mask in a block of "
                f"{self.block_length}, so that nothing would be trained. At least {1 / self.block_length:.3g}, or "
                f"model_cfg.resample_masks=false"
            )
        if self.sampler == "ancestral_cache" and self.time_conditioning:
            problems.append(
                "model_cfg.sampler=ancestral_cache reuses predictions between times, which "
                "model_cfg.time_conditioning=true rules out. Set model_cfg.sampler=ancestral or first_hitting"
            )
        lengths = {"model_cfg.n_ctx": self.n_ctx, "train_seq_len": run.train_seq_len}
        if run.val_seq_len is not None:
            lengths["val_seq_len"] = run.val_seq_len
        for name, length in lengths.items():
            if length % self.block_length:
                below = length // self.block_length * self.block_length
                nearest = [str(v) for v in (below, below + self.block_length) if v > 0]
                problems.append(
                    f"{name} ({length}) must be a multiple of model_cfg.block_length ({self.block_length}); "
                    f"nearest: {', '.join(nearest)}"
                )
        return problems


class BD3LM(DiT):
    """Denoises each block given the clean blocks before it.

    Training: clean and noisy tokens go through the network side by side (2L tokens, one pass). Scoring: the clean
    tokens go through once, `read`, for any number of noisy versions of them. Sampling: finished blocks are in a
    cache, where they were stored by a pass over their clean tokens.
    """

    Config = BD3LMConfig
    cfg: BD3LMConfig

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        tau: Tensor,
        doc_ids: Tensor | None = None,
        clean: Tensor | KVCache | None = None,
        blocks: Tensor | None = None,
        cache: KVCache | None = None,
        store: bool = False,
    ) -> Tensor:
        """tokens (B, T) int64 -> hidden (B, T, D). Give either `clean` or `cache`.

        tau (B,) or (B, T). clean (B, T): the row without noise, or what `read` made of it; the result belongs to the
        noisy `tokens`. cache: `tokens` continue what it holds; `store` keeps their keys and values (`tokens` must then
        be clean and tau 0, which is what clean tokens get in training). blocks (T,): block of each position, not
        decreasing, none longer than `block_length` + 1; default: consecutive ones from the first position on.
        """
        if (clean is None) == (cache is None):
            raise ValueError(
                "bd3lm: give either the clean tokens (training) or a cache (sampling), and not both"
            )
        if blocks is None:
            blocks = self._consecutive(tokens)
        if cache is None:
            return self._beside(tokens, clean, tau, doc_ids, blocks)  # type: ignore[arg-type]
        if doc_ids is not None:
            raise ValueError("doc_ids cannot be combined with a cache: a cached row is one document")
        return self._continue(tokens, tau, blocks, cache, store)

    def read(self, clean: Tensor, doc_ids: Tensor | None = None, blocks: Tensor | None = None) -> KVCache:
        """clean (B, T) -> keys and values, to be given to `forward` as `clean` with the same doc_ids and blocks."""
        cache = self.init_cache(len(clean))
        self.clean_states(clean, doc_ids, blocks, cache)
        cache.advance(clean.shape[1])
        return cache

    def clean_states(
        self,
        clean: Tensor,
        doc_ids: Tensor | None = None,
        blocks: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """clean (B, T) -> hidden (B, T, D). Training reads no loss there, only what noisy tokens attend to."""
        length = clean.shape[1]
        blocks = self._consecutive(clean) if blocks is None else blocks
        visible = Visible(
            *(len(clean), length, length, clean.device),
            causal=False,
            doc_ids=doc_ids,
            mask=(blocks[:, None] >= blocks)[None, None],
        )
        plans = [self.plan(visible)] * self.cfg.n_layers
        positions = torch.arange(length, device=clean.device)
        tau = torch.zeros(len(clean), device=clean.device)
        return self.trunk(clean, self.condition(tau), positions, plans, cache)

    def _consecutive(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1], device=tokens.device) // self.cfg.block_length

    def _one_pass(self, blocks: Tensor, doc_ids: Tensor | None, rows: int, noisy_only: bool = False) -> Plan:
        """Of clean tokens followed by noisy ones."""
        longest = self.cfg.block_length + 1  # a given token may precede the first block
        pattern, both = OnePass(blocks, longest, noisy_only), 2 * len(blocks)
        queries = len(blocks) if noisy_only else both
        return self.plan(
            Visible(rows, queries, both, blocks.device, causal=False, doc_ids=doc_ids, pattern=pattern)
        )

    def _beside(
        self, noisy: Tensor, clean: Tensor | KVCache, tau: Tensor, doc_ids: Tensor | None, blocks: Tensor
    ) -> Tensor:
        rows, length = noisy.shape
        positions = torch.arange(length, device=noisy.device)
        noisy_only = self._one_pass(blocks, doc_ids, rows, noisy_only=True)
        if isinstance(clean, KVCache):
            return self.trunk(noisy, self.condition(tau), positions, [noisy_only] * self.cfg.n_layers, clean)
        if self.cfg.time_conditioning:
            tau = tau if tau.ndim == 2 else tau[:, None].expand(noisy.shape)
            tau = torch.cat((torch.zeros_like(tau), tau), dim=1)  # (B, 2T): clean tokens carry no noise
        # What the last layer makes of the clean tokens nobody reads.
        plans = [self._one_pass(blocks, doc_ids, rows)] * (self.cfg.n_layers - 1) + [noisy_only]
        both = torch.cat((clean, noisy), dim=1)
        return self.trunk(both, self.condition(tau), positions.repeat(2), plans)

    def _continue(self, tokens: Tensor, tau: Tensor, blocks: Tensor, cache: KVCache, store: bool) -> Tensor:
        past, (rows, length) = cache.length, tokens.shape
        positions = torch.arange(past, past + length, device=tokens.device)
        mask = cached_mask(blocks, past)[None, None]
        plan = self.plan(Visible(rows, length, past + length, tokens.device, causal=False, mask=mask))
        hidden = self.trunk(tokens, self.condition(tau), positions, [plan] * self.cfg.n_layers, cache)
        if store:
            cache.advance(length)
        return hidden

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        blocks = torch.empty(seq_len + 1, device="meta")
        ids, both = blocks[None], 2 * len(blocks)
        visible = Visible(
            1,
            both,
            both,
            ids.device,
            causal=False,
            doc_ids=ids,
            pattern=OnePass(blocks, self.cfg.block_length),
        )
        return {"attention": attention_call(visible.facts, **self._heads)}

    def init_cache(self, rows: int) -> KVCache:
        return KVCache(self.cfg.n_layers, rows)

    def passes(self, path: str) -> float:
        """Of what stands twice in a row, clean and noisy."""
        return 2.0 if path.startswith("layers.") else 1.0

    def flops(self, seq_len: int) -> Flops:
        """Per token: the blocks run on 2L tokens, which attend to L^2 + L L' pairs in all. In the last layer only the
        noisy half goes on behind its keys and values, with half of the pairs."""
        c, longest = self.cfg, self.cfg.block_length + 1
        multiplied = (c.n_layers - 1) * one_pass_pairs(seq_len, longest)
        multiplied += one_pass_pairs(seq_len, longest, noisy_only=True)
        unread = (
            2 * c.d_model**2 + 4 * c.d_model * c.hidden_width
        )  # attention's output and the MLP, of clean tokens
        pairs = (c.n_layers - 0.5) * (seq_len + c.block_length)
        trunk = 2 * self._products() - unread
        conditioning = 0.0
        if c.time_conditioning:  # one per token of both halves, the last modulation only of the noisy one
            conditioning = 2 * self._conditioning() - 2 * self.final_adaln.weight.numel()
        return self._flops(trunk + conditioning, pairs, multiplied / seq_len)
