"""SEDD: score entropy discrete diffusion (Lou et al. 2024, arXiv:2310.16834).

The network is the shared diffusion transformer, read as log-scores; graphs, noise, the bound and the samplers
are in the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from configs.schema import Free, NonNegativeFloat, OpenFraction, Positive, Rate
from models.dit import DiT, DiTConfig, Draws, fill_in

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["SEDD", "SEDDConfig"]

# What the paper trains each graph with on text (its appendix C.1).
PAPER = {"absorbing": {"noise_schedule": "loglinear"}, "uniform": {"noise_schedule": "geometric"}}


class SEDDConfig(DiTConfig):
    transition_type: Literal["absorbing", "uniform"] = "absorbing"
    # null = PAPER's for the graph
    noise_schedule: Literal["loglinear", "geometric"] = "loglinear"
    sampling_eps: OpenFraction = 1e-3  # smallest t that training draws
    num_timesteps: Free[Positive] = (
        1000  # times per sequence in a likelihood evaluation, where nelbo_draws is null
    )
    nelbo_draws: Free[Draws | None] = 8  # type: ignore[assignment]
    sampling_timesteps: Free[Positive] = 1024
    se_loss_weight: Free[NonNegativeFloat] = 1.0  # of the score entropy, which is the bound
    lm_loss_weight: Free[NonNegativeFloat] = 0.0  # of a denoising cross-entropy at masked positions
    predictor: Free[Literal["analytic", "euler"]] = "analytic"
    scale_by_sigma: bool | None = None  # scores in units of the noise; null = true iff absorbing
    use_low_discrepancy_sampler: Free[bool] = True  # times stratified over the rows of a step
    noise_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-3  # loglinear: exp(-sigma(1))
    sigma_min: Rate = 1e-4  # geometric: noise at t = 0 and 1
    sigma_max: Rate = 20.0

    tiny = {"sampling_timesteps": 8}
    examples = {
        "final_step": ("argmax", {"noise_schedule": "geometric", "sigma_min": 1.0}),  # leaves much to it
        "num_timesteps": (8, {"nelbo_draws": None, "num_timesteps": 4}),
        "predictor": ("euler", {"noise_schedule": "geometric", "sampling_timesteps": 2}),
        "sigma_min": (0.01, {"noise_schedule": "geometric"}),
        "sigma_max": (10.0, {"noise_schedule": "geometric"}),
    }

    @model_validator(mode="before")
    @classmethod
    def _of_the_paper(cls, given: Any) -> Any:
        return fill_in(given, PAPER)

    @field_validator("noise_schedule", mode="before")
    @classmethod
    def _mutual_info(cls, given: Any, known: ValidationInfo) -> Any:
        """On the absorbing graph 1 - exp(-sigma) grows linearly in t: D3PM's mutual-information schedule."""
        if given != "mutual_info":
            return given
        if known.data.get("transition_type") == "uniform":
            raise ValueError(
                "mutual_info is loglinear on the absorbing graph, and nothing here on the uniform one. Set it to "
                "loglinear, or to geometric, the paper's"
            )
        return "loglinear"

    @property
    def has_mask(self) -> bool:
        return self.transition_type == "absorbing"

    @property
    def scaled(self) -> bool:
        """Whether scores are divided by (exp(sigma) - 1) n, so that a zero output is a uniform prediction."""
        return self.has_mask if self.scale_by_sigma is None else self.scale_by_sigma

    def unread(self) -> dict[str, str]:
        loglinear = self.noise_schedule == "loglinear"
        fields = ("sigma_min", "sigma_max") if loglinear else ("noise_eps",)
        found = dict.fromkeys(fields, f"noise_schedule={self.noise_schedule}")
        if (
            loglinear and self.has_mask
        ):  # e^(sigma(t) - sigma(s)) - 1 = (t - s) sigma'(t): the steps are the same
            found["predictor"] = "noise_schedule=loglinear"
        if self.nelbo_draws is not None:
            found["num_timesteps"] = f"nelbo_draws={self.nelbo_draws}"
        return found

    def problems(self, run: RunConfig) -> list[str]:
        problems = super().problems(run)
        if self.sigma_min >= self.sigma_max:
            problems.append(
                f"model_cfg.sigma_min ({self.sigma_min}) must be below model_cfg.sigma_max ({self.sigma_max})"
            )
        if self.se_loss_weight == 0 and self.lm_loss_weight == 0:
            problems.append(
                "model_cfg.se_loss_weight and model_cfg.lm_loss_weight are both 0: nothing is trained"
            )
        if not self.has_mask and self.scaled:
            problems.append(
                "model_cfg.scale_by_sigma must be false with transition_type=uniform: its scores are near 1"
            )
        if not self.has_mask and self.lm_loss_weight > 0:
            problems.append(
                f"model_cfg.lm_loss_weight ({self.lm_loss_weight}) scores masked positions, and "
                "transition_type=uniform has none. Set model_cfg.lm_loss_weight=0"
            )
        return problems


class SEDD(DiT):
    Config = SEDDConfig
