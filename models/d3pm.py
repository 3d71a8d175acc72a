"""D3PM: discrete-time diffusion with structured transition matrices (Austin et al. 2021, arXiv:2107.03006).

The network is the shared diffusion transformer; the chains, the bound and the sampler are in the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from configs.schema import Execution, Free, NonNegativeFloat, Positive
from models.dit import DiT, DiTConfig, fill_in
from naming import expand_path

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["D3PM", "D3PMConfig"]

Probability = Annotated[float, Field(gt=0, le=1)]
DENSE_CHAINS = ("gaussian", "nearest_neighbor")  # a table of K x K transition probabilities
# What the paper trains each chain with on text (its section 5, appendix B.2 and tables 1 and 5).
PAPER: dict[str, dict[str, Any]] = {
    "absorbing": {"noise_schedule": "mutual_info", "auxiliary_loss_weight": 0.01},
    "uniform": {"noise_schedule": "cosine", "auxiliary_loss_weight": 0.0},
    "gaussian": {"noise_schedule": "linear", "auxiliary_loss_weight": 0.001},
    "nearest_neighbor": {"noise_schedule": "mutual_info", "auxiliary_loss_weight": 0.0},
}


def _embedding(width: int) -> Callable[[Path, int], str]:
    """For `examples`: what writes a file of embeddings, (vocabulary, width), into a folder."""

    def write(folder: Path, vocabulary: int) -> str:
        path = folder / f"embedding-{width}.npy"
        np.save(path, np.random.default_rng(width).normal(size=(vocabulary, width)))
        return str(path)

    return write


_LINEAR = {"noise_schedule": "linear"}
_GAUSSIAN = {"transition_type": "gaussian", "noise_schedule": "linear"}
_NEIGHBORS = {
    "transition_type": "nearest_neighbor",
    "noise_schedule": "cosine",
    "nn_embedding_path": _embedding(8),
}
_FEW_STEPS = {
    "transition_type": "uniform",
    "noise_schedule": "cosine",
    "num_timesteps": 4,
    "sampling_timesteps": 4,
}


class D3PMConfig(DiTConfig):
    transition_type: Literal["absorbing", "uniform", "gaussian", "nearest_neighbor"] = "absorbing"
    noise_schedule: Literal["mutual_info", "cosine", "linear"] = "mutual_info"  # null = PAPER's for the chain
    num_timesteps: Positive = 1000  # T, steps of the chain
    nelbo_steps: Free[Positive | None] = None  # steps of the bound; fewer: coarser, cheaper; null = all
    # lambda of the cross-entropy; null = PAPER's for the chain
    auxiliary_loss_weight: Free[NonNegativeFloat] = 0.01
    sampling_timesteps: Free[Positive] = 1000  # reverse steps S <= T; fewer are even skips
    gaussian_beta_min: Probability = 1e-4  # linear schedule of the gaussian chain
    gaussian_beta_max: Probability = 0.02
    linear_beta_min: Probability = 0.02  # linear schedule of the other chains
    linear_beta_max: Probability = 1.0
    nearest_neighbors: Positive = 5  # k of the graph over embeddings
    nn_embedding_path: str | None = None  # pretrained embeddings, (K, any width), .npy or .pt
    nn_construction: Literal["expm", "sinkhorn"] = "expm"
    dense_state_limit: Execution[Positive] = 16384  # most states K of a chain with a dense table: K^2 numbers
    reverse_param: Literal["joint", "mixture"] = "joint"  # equation 4, or a mixture of normalised posteriors
    l0_mode: Literal["posterior", "x0"] = "posterior"  # last step by equation 4, or by p(x0) itself
    zero_mask_logit: bool = False  # absorbing: the network gives the mask no probability

    tiny = {"num_timesteps": 50, "sampling_timesteps": 8}
    examples = {
        "gaussian_beta_min": (0.001, _GAUSSIAN),
        "gaussian_beta_max": (0.5, _GAUSSIAN),
        "linear_beta_min": (0.1, _LINEAR),
        "linear_beta_max": (0.5, _LINEAR),
        "nearest_neighbors": (3, _NEIGHBORS),
        "nn_embedding_path": (_embedding(9), _NEIGHBORS),
        "nn_construction": ("sinkhorn", _NEIGHBORS),
        "dense_state_limit": (1000, _GAUSSIAN),
        "l0_mode": ("x0", _FEW_STEPS),
    }

    @model_validator(mode="before")
    @classmethod
    def _of_the_paper(cls, given: Any) -> Any:
        return fill_in(given, PAPER)

    @property
    def has_mask(self) -> bool:
        return self.transition_type == "absorbing"

    @property
    def share_of_logits(self) -> float:
        """The auxiliary cross-entropy is over all positions."""
        return 1.0 if self.auxiliary_loss_weight else super().share_of_logits

    def unread(self) -> dict[str, str]:
        kind, linear = self.transition_type, self.noise_schedule == "linear"
        found: dict[str, str] = {}
        for chain in ("gaussian", "linear"):
            if not linear or (chain == "gaussian") != (kind == "gaussian"):
                why = f"transition_type={kind}" if linear else f"noise_schedule={self.noise_schedule}"
                found |= dict.fromkeys((f"{chain}_beta_min", f"{chain}_beta_max"), why)
        if kind != "nearest_neighbor":
            found |= dict.fromkeys(
                ("nearest_neighbors", "nn_embedding_path", "nn_construction"), f"transition_type={kind}"
            )
        if self.zero_mask_logit:  # every posterior of a masked token is then in proportion to the prediction
            found |= dict.fromkeys(("reverse_param", "l0_mode"), "zero_mask_logit=true")
        if kind not in DENSE_CHAINS:
            found["dense_state_limit"] = f"transition_type={kind}"
        return found

    def problems(self, run: RunConfig) -> list[str]:
        return super().problems(run) + self._schedule_problems() + self._chain_problems()

    def _schedule_problems(self) -> list[str]:
        problems = []
        if self.sampling_timesteps > self.num_timesteps:
            problems.append(
                f"model_cfg.sampling_timesteps ({self.sampling_timesteps}) must not exceed "
                f"model_cfg.num_timesteps ({self.num_timesteps}); nearest: {self.num_timesteps}"
            )
        if self.nelbo_steps is not None and self.nelbo_steps > self.num_timesteps:
            problems.append(
                f"model_cfg.nelbo_steps ({self.nelbo_steps}) must not exceed "
                f"model_cfg.num_timesteps ({self.num_timesteps}); nearest: {self.num_timesteps}"
            )
        for chain in ("gaussian", "linear"):
            low, high = getattr(self, f"{chain}_beta_min"), getattr(self, f"{chain}_beta_max")
            if low > high:
                problems.append(
                    f"model_cfg.{chain}_beta_min ({low}) must not exceed model_cfg.{chain}_beta_max ({high})"
                )
        return problems

    def _chain_problems(self) -> list[str]:
        problems = []
        if self.zero_mask_logit and not self.has_mask:
            problems.append(
                f"model_cfg.zero_mask_logit needs a mask state, and model_cfg.transition_type is "
                f"'{self.transition_type}'. Set model_cfg.zero_mask_logit=false or model_cfg.transition_type=absorbing"
            )
        if self.transition_type == "nearest_neighbor" and self.nn_embedding_path is None:
            problems.append(
                "model_cfg.transition_type=nearest_neighbor needs model_cfg.nn_embedding_path, a file of "
                "pretrained embeddings: neighbours in untrained ones mean nothing"
            )
        kind, schedule = self.transition_type, self.noise_schedule
        sinkhorn = kind == "nearest_neighbor" and self.nn_construction == "sinkhorn"
        if schedule == "mutual_info" and (kind == "gaussian" or sinkhorn):
            chain = f"nn_construction={self.nn_construction}" if sinkhorn else f"transition_type={kind}"
            problems.append(
                f"model_cfg.noise_schedule=mutual_info is not defined for {chain}. Set it to cosine or linear"
            )
        if kind == "nearest_neighbor" and self.nn_embedding_path is not None:
            try:
                if not expand_path(self.nn_embedding_path).is_file():
                    problems.append(f"model_cfg.nn_embedding_path: no such file: {self.nn_embedding_path}")
            except ValueError as error:
                problems.append(f"model_cfg.nn_embedding_path: {error}")
            if self.vocab_size is not None and self.nearest_neighbors >= self.vocab_size:
                problems.append(
                    f"model_cfg.nearest_neighbors ({self.nearest_neighbors}) must be below model_cfg.vocab_size "
                    f"({self.vocab_size})"
                )
        dense = kind in DENSE_CHAINS
        if dense and self.vocab_size is not None and self.vocab_size > self.dense_state_limit:
            problems.append(
                f"model_cfg.vocab_size ({self.vocab_size}) exceeds model_cfg.dense_state_limit "
                f"({self.dense_state_limit}): a {self.transition_type} chain keeps tables of K x K numbers. "
                "Use a smaller tokenizer, or transition_type=absorbing or uniform"
            )
        return problems


class D3PM(DiT):
    Config = D3PMConfig
