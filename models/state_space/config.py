"""The fields of mamba, of both versions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from configs.match import TILE, Dial, SizeDials, multiples
from configs.schema import Free, ModelConfig, NonNegative, Positive, Rate

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["MambaConfig"]

# Fields that one version alone reads.
OF_SELECTIVE = ("time_step_rank", "time_step_scale", "time_step_init_scheme")
OF_DUAL = ("headdim", "ngroups", "chunk_size", "A_init_range")


class MambaConfig(ModelConfig):
    """Defaults are the published 130M model: 24 mixers, as many parameters as 12 layers of attention and MLP."""

    version: Literal[1, 2] = 1  # selective scan (Gu and Dao 2023) or state-space duality (Dao and Gu 2024)
    vocab_size: Positive | None = None
    d_model: Positive = 768
    n_layers: Positive = 24  # mixers
    d_state: Positive | None = None  # None = 16 (version 1) or 128 (version 2)
    expand: Positive = 2  # inner width / d_model
    d_conv: Positive = 4  # tokens that the convolution sees, the current one included
    use_bias: bool = False  # of in_proj and out_proj
    use_conv_bias: bool = True
    d_intermediate: NonNegative = 0  # hidden width of a gated MLP behind each mixer; 0 = none
    norm_eps: Rate = 1e-5
    tie_embeddings: bool = True
    residual_in_fp32: bool = True  # False: the residual stream in the format of matrix products
    initializer_range: Rate = 0.02  # std of embeddings
    rescale_prenorm_residual: bool = (
        True  # what writes to the residual stream begins smaller by sqrt(n_layers)
    )
    time_step_min: Rate = 1e-3  # step sizes begin log-uniform between the two,
    time_step_max: Rate = 0.1
    time_step_floor: Rate = 1e-4  # and no smaller than this
    time_step_rank: Positive | Literal["auto"] = "auto"  # auto = d_model / 16, rounded up
    time_step_scale: Rate = 1.0  # of the first weights that make step sizes of low-rank ones
    # "uniform" is another word for random, in other projects' files.
    time_step_init_scheme: Annotated[
        Literal["random", "constant"], BeforeValidator(lambda word: "random" if word == "uniform" else word)
    ] = "random"
    headdim: Positive = 64  # channels that share one rate of decay and one step size
    ngroups: Positive = 1  # of heads that share what leads into states and out of them
    # Tokens between which states are computed as attention is. The paper's kernels take 256; 64 are fewer operations,
    # and faster on a CPU: 92 : 210 ms (16 x 256 tokens, 6 heads of 64, 128 states, one thread, forward and backward).
    chunk_size: Free[Positive] = 64
    A_init_range: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [1.0, 16.0]  # of rates of decay

    tiny = {"d_model": 64, "n_layers": 2}
    examples = {
        "version": 2,
        "time_step_floor": 0.05,  # above the least
        "d_intermediate": 32,
        "headdim": (32, {"version": 2}),
        "ngroups": (2, {"version": 2}),
        "chunk_size": (8, {"version": 2}),
        "A_init_range": ([2.0, 4.0], {"version": 2}),
        "time_step_init_scheme": "constant",
        "time_step_rank": 3,
    }
    rare = {"residual_in_fp32": "numbers are narrower under mixed precision alone"}

    def size_dials(self) -> SizeDials:
        """Widths in whole heads (version 1: tiles), mixers, states of each channel."""
        tile = (
            TILE if self.version == 1 else math.lcm(TILE, self.headdim // math.gcd(self.headdim, self.expand))
        )
        return SizeDials(
            Dial(max(1, round(self.d_model / tile)), lambda n: {"d_model": n * tile}),
            Dial(self.n_layers, lambda n: {"n_layers": n}),
            (multiples("d_state", self.states, 1 if self.version == 1 else 4),),
        )

    @property
    def inner(self) -> int:
        """E, the width between the two projections of a mixer."""
        return self.expand * self.d_model

    @property
    def states(self) -> int:
        """N, those of each channel."""
        return self.d_state or (16 if self.version == 1 else 128)

    @property
    def rank(self) -> int:
        """R, of step sizes of version 1."""
        return -(-self.d_model // 16) if self.time_step_rank == "auto" else self.time_step_rank

    @property
    def heads(self) -> int:
        """H, of version 2."""
        return self.inner // self.headdim

    def problems(self, run: RunConfig) -> list[str]:
        found = super().problems(run)
        if self.time_step_min > self.time_step_max:
            found.append(
                f"model_cfg.time_step_min ({self.time_step_min}) must not exceed model_cfg.time_step_max "
                f"({self.time_step_max}). Nearest: time_step_min={self.time_step_max}"
            )
        if self.time_step_floor > self.time_step_max:
            found.append(
                f"model_cfg.time_step_floor ({self.time_step_floor}) must not exceed model_cfg.time_step_max "
                f"({self.time_step_max}): all step sizes would begin as one. Nearest: "
                f"time_step_floor={self.time_step_max}"
            )
        if self.version == 1:
            return found
        low, high = self.A_init_range
        if low > high:
            found.append(f"model_cfg.A_init_range ([{low}, {high}]) must rise. Nearest: [{high}, {low}]")
        if self.inner % self.headdim:
            legal = [n for n in range(1, self.inner + 1) if self.inner % n == 0]
            nearest = min(legal, key=lambda n: abs(n - self.headdim))
            return [
                *found,
                f"model_cfg.expand * model_cfg.d_model ({self.inner}) must be divisible by model_cfg.headdim "
                f"({self.headdim}). Nearest: headdim={nearest}",
            ]
        if self.heads % self.ngroups:
            legal = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            nearest = min(legal, key=lambda n: abs(n - self.ngroups))
            found.append(
                f"the {self.heads} heads (model_cfg.expand * model_cfg.d_model / model_cfg.headdim) must be divisible "
                f"by model_cfg.ngroups ({self.ngroups}). Nearest: ngroups={nearest}"
            )
        return found

    def unread(self) -> dict[str, str]:
        others = OF_DUAL if self.version == 1 else OF_SELECTIVE
        return {**super().unread(), **dict.fromkeys(others, f"version={self.version}")}
