"""BD3-LM: diffusion inside blocks, autoregression across them (Arriola et al. 2025, arXiv:2503.09573)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from configs.schema import OpenFraction, Positive
from models.dit import DiT, DiTConfig

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["BD3LM", "BD3LMConfig"]


class BD3LMConfig(DiTConfig):
    """Masked diffusion with linear masking probability u = t; within a block everything is as in `mdl`."""

    time_conditioning: bool = False
    block_size: Positive = 16  # 4, 8 and 16 in the paper; 1 is autoregressive, the whole row is `mdl`
    sampling_eps_min: OpenFraction = 1e-3  # training draws masking probabilities from [min, max]
    sampling_eps_max: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip_search: bool = True  # at evaluations, look for the range with least variance
    resample_masks: bool = True  # redraw masks until the masked fraction lies in the range
    use_low_discrepancy_sampler: bool = True  # times stratified over the blocks of a step
    num_sampling_steps: Positive = 1000  # per block, of the samplers that have steps
    sampler: Literal["ancestral_cache", "ancestral", "analytic", "first_hitting"] = "first_hitting"
    kv_cache: bool = True  # sampling keeps the keys and values of finished blocks

    def problems(self, run: RunConfig) -> list[str]:
        problems = super().problems(run)
        if self.sampling_eps_min >= self.sampling_eps_max:
            problems.append(
                f"model_cfg.sampling_eps_min ({self.sampling_eps_min}) must be below "
                f"model_cfg.sampling_eps_max ({self.sampling_eps_max})"
            )
        if self.sampler == "ancestral_cache" and self.time_conditioning:
            problems.append(
                "model_cfg.sampler=ancestral_cache reuses predictions between times, which "
                "model_cfg.time_conditioning=true rules out. Set sampler=ancestral or first_hitting"
            )
        lengths = {"model_cfg.n_ctx": self.n_ctx, "train_seq_len": run.train_seq_len}
        if run.val_seq_len is not None:
            lengths["val_seq_len"] = run.val_seq_len
        for name, length in lengths.items():
            if length % self.block_size:
                below = length // self.block_size * self.block_size
                nearest = [str(v) for v in (below, below + self.block_size) if v > 0]
                problems.append(
                    f"{name} ({length}) must be a multiple of model_cfg.block_size ({self.block_size}); "
                    f"nearest: {', '.join(nearest)}"
                )
        return problems


class BD3LM(DiT):
    """The shared diffusion transformer with the attention pattern of `models.layers.block_diffusion`."""

    Config = BD3LMConfig
