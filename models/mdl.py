"""MDLM: masked diffusion language models (Sahoo et al. 2024, arXiv:2406.07524).

The network is the shared diffusion transformer; schedules, the bound and the samplers are in the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from configs.schema import Free, NonNegativeFloat, OpenFraction, Positive
from models.dit import DiT, DiTConfig

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["MDL", "MDLConfig", "Sampler", "unread_by_sampler"]

Sampler = Literal["ancestral_cache", "ancestral", "analytic", "first_hitting"]


def _one_of_two(value: Any) -> Any:
    if value == "linear":
        raise ValueError(
            "'linear' may mean two schedules. Name one: loglinear, where the share of masked tokens grows linearly "
            "(the paper's), or linear_sigma, where the total noise does"
        )
    return value


AlphaType = Annotated[
    Literal["loglinear", "cosine", "cosine_sq", "geometric", "linear_sigma"], BeforeValidator(_one_of_two)
]
SIGMA_SCHEDULES = ("geometric", "linear_sigma")


def unread_by_sampler(sampler: str) -> dict[str, str]:
    """Fields of masked diffusion that a sampler does not read: first hitting has no steps, and like the analytic one it
    ends with a draw, as in the released codes."""
    fields = {"first_hitting": ("num_sampling_steps", "final_step"), "analytic": ("final_step",)}
    return dict.fromkeys(fields.get(sampler, ()), f"sampler={sampler}")


class MDLConfig(DiTConfig):
    time_conditioning: bool = False  # off is what allows a sampler to reuse predictions
    sampling_eps: OpenFraction = 1e-3  # smallest t that training draws
    alpha_type: AlphaType = "loglinear"  # survival probability alpha(t)
    alpha_min: OpenFraction = 1e-3  # alpha(1)
    alpha_max: Annotated[float, Field(gt=0, le=1)] = 1.0  # alpha(0)
    sigma_min: NonNegativeFloat = 1e-4  # noise at t = 0 and 1 of the schedules in sigma = -log alpha
    sigma_max: NonNegativeFloat = 20.0
    continuous_time: bool = True  # False: the bound of `num_timesteps` steps
    num_timesteps: Positive = 1000
    use_subs_parameterization: bool = True  # False: plain softmax over all states, for the ablation
    num_sampling_steps: Free[Positive] = 1000
    use_low_discrepancy_sampler: Free[bool] = True  # times stratified over the rows of a step
    sampler: Free[Sampler] = "ancestral_cache"
    sar_chunk_size: Free[Positive | None] = None  # new tokens per semi-autoregressive round; null = n_ctx / 2

    tiny = {"num_sampling_steps": 8}
    examples = {
        "time_conditioning": (True, {"sampler": "ancestral"}),
        "final_step": ("argmax", {"alpha_max": 0.5}),  # leaves much to it
        "sigma_min": (0.01, {"alpha_type": "geometric"}),
        "sigma_max": (10.0, {"alpha_type": "geometric"}),
        "num_timesteps": (10, {"continuous_time": False}),
        "use_subs_parameterization": (False, {"continuous_time": False, "sampler": "ancestral"}),
    }

    @property
    def sar_chunk(self) -> int:
        """New tokens per round of semi-autoregressive generation: 512 at the paper's context of 1024."""
        return max(1, self.n_ctx // 2) if self.sar_chunk_size is None else self.sar_chunk_size

    def unread(self) -> dict[str, str]:
        by_sigma = self.alpha_type in SIGMA_SCHEDULES
        ends = ("alpha_min", "alpha_max") if by_sigma else ("sigma_min", "sigma_max")
        other = "num_timesteps" if self.continuous_time else "sampling_eps"
        return (
            dict.fromkeys(ends, f"alpha_type={self.alpha_type}")
            | {other: f"continuous_time={str(self.continuous_time).lower()}"}
            | unread_by_sampler(self.sampler)
        )

    def problems(self, run: RunConfig) -> list[str]:
        return super().problems(run) + self._schedule_problems() + self._sampler_problems()

    def _schedule_problems(self) -> list[str]:
        problems = []
        if self.alpha_min >= self.alpha_max:
            problems.append(
                f"model_cfg.alpha_min ({self.alpha_min}) must be below model_cfg.alpha_max ({self.alpha_max})"
            )
        if self.alpha_type in SIGMA_SCHEDULES and self.sigma_min >= self.sigma_max:
            problems.append(
                f"model_cfg.sigma_min ({self.sigma_min}) must be below model_cfg.sigma_max ({self.sigma_max})"
            )
        if self.alpha_type == "geometric" and self.sigma_min == 0:
            problems.append(
                "model_cfg.sigma_min must be above 0 with alpha_type=geometric; the paper's is 1e-4"
            )
        if not self.use_subs_parameterization and self.continuous_time:
            problems.append(
                "model_cfg.use_subs_parameterization=false has a bound in discrete time only. "
                "Set model_cfg.continuous_time=false"
            )
        return problems

    def _sampler_problems(self) -> list[str]:
        problems = []
        if self.sampler == "ancestral_cache" and self.time_conditioning:
            problems.append(
                "model_cfg.sampler=ancestral_cache reuses predictions between times, which "
                "model_cfg.time_conditioning=true rules out. Set model_cfg.sampler=ancestral or "
                "model_cfg.time_conditioning=false"
            )
        if self.sampler != "ancestral" and not self.use_subs_parameterization:
            problems.append(
                f"model_cfg.sampler={self.sampler} needs model_cfg.use_subs_parameterization=true: it never "
                "draws the mask. Set model_cfg.sampler=ancestral"
            )
        if self.sar_chunk_size is not None and self.sar_chunk_size >= self.n_ctx:
            problems.append(
                f"model_cfg.sar_chunk_size ({self.sar_chunk_size}) must leave a prefix in model_cfg.n_ctx "
                f"({self.n_ctx}); nearest: {max(1, self.n_ctx - 1)}"
            )
        return problems


class MDL(DiT):
    Config = MDLConfig
