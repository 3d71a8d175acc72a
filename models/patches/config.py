"""The fields of megabyte."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from configs.match import Dial, SizeDials, multiples, ratio_dial
from configs.schema import (
    Dropout,
    Free,
    ModelConfig,
    NonNegative,
    Positive,
    Rate,
    byte_vocabulary,
    divisible,
    in_whole,
    within_context,
)

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["MegabyteConfig"]


class MegabyteConfig(ModelConfig):
    """Defaults are those of 120 million parameters; the global stack is patch_size * d_global_pre_patch wide."""

    unit = "byte"

    vocab_size: Positive | None = None
    n_ctx: Positive = 8192  # bytes
    patch_size: Positive = 16
    d_local: Positive = 512
    d_global_pre_patch: Positive = 64  # of each byte in a patch
    n_layers_d_global: Positive = 8
    n_layers_d_local: Positive = 6
    local_n_heads: Positive = 8
    global_n_heads: Positive = 16
    d_mult: Positive | Rate = 4  # hidden width / width, of both stacks
    mlp_type: Literal["relu", "swiglu"] = "relu"
    cross_patch_r: NonNegative | None = (
        None  # bytes of the patch before that local layers see; None = half of it
    )
    patch_conv: bool = False  # convolutions over bytes before they are cut into patches
    strided_inference: Free[bool] = False  # score every byte from a patch that is no more than half full
    is_causal: Literal[True] = True
    dropout: Free[Dropout] = 0.0  # of embeddings, attention probabilities and what blocks add

    tiny = {
        "n_ctx": 32,
        "patch_size": 4,
        "d_local": 32,
        "d_global_pre_patch": 16,
        "n_layers_d_global": 2,
        "n_layers_d_local": 2,
        "local_n_heads": 2,
        "global_n_heads": 4,
    }
    examples = {"cross_patch_r": 1}
    rare = {"is_causal": "its other value is an error"}
    own_sizes = frozenset({"d_model", "n_layers", "n_heads"})

    @property
    def d_global(self) -> int:
        """Width of the global stack."""
        return self.patch_size * self.d_global_pre_patch

    def hidden_width(self, width: int) -> int:
        """Of the feed-forward layers of a stack of this width."""
        return max(1, round(self.d_mult * width))

    def size_dials(self) -> SizeDials:
        """Both stacks keep their proportions; finer ones are the hidden widths and the local stack's layers."""
        local_head = self.d_local // self.local_n_heads
        one = math.lcm(self.patch_size, self.d_global // self.global_n_heads)  # of the global width
        ratio, layers = self.d_local / self.d_global, self.n_layers_d_local / self.n_layers_d_global

        def width(n: int) -> dict[str, Any]:
            found = {"d_global_pre_patch": n * one // self.patch_size}
            found["global_n_heads"] = max(1, round(n * one * self.global_n_heads / self.d_global))
            heads = max(1, round(ratio * n * one / local_head))
            return {**found, "d_local": heads * local_head, "local_n_heads": heads}

        def depth(n: int) -> dict[str, Any]:
            return {"n_layers_d_global": n, "n_layers_d_local": max(1, round(layers * n))}

        return SizeDials(
            Dial(max(1, round(self.d_global / one)), width),
            Dial(self.n_layers_d_global, depth),
            (multiples("n_layers_d_local", self.n_layers_d_local, 1), ratio_dial("d_mult", self.d_mult)),
        )

    @property
    def reach(self) -> int:
        """Bytes of the patch before that local layers see."""
        return self.patch_size // 2 if self.cross_patch_r is None else self.cross_patch_r

    def problems(self, run: RunConfig) -> list[str]:
        found = super().problems(run) + byte_vocabulary(self.vocab_size)
        found += in_whole(run, "patch_size", self.patch_size) + within_context(run, self.n_ctx)
        found += divisible("d_local", self.d_local, "local_n_heads", self.local_n_heads)
        if self.d_global % self.global_n_heads:
            legal = [n for n in range(1, self.d_global + 1) if self.d_global % n == 0]
            nearest = min(legal, key=lambda n: abs(n - self.global_n_heads))
            found.append(
                f"model_cfg.patch_size * model_cfg.d_global_pre_patch ({self.patch_size} * {self.d_global_pre_patch} = "
                f"{self.d_global}) must be divisible by model_cfg.global_n_heads ({self.global_n_heads}); nearest "
                f"global_n_heads: {nearest}"
            )
        width = self.d_local // self.local_n_heads
        if self.d_local % self.local_n_heads == 0 and width % 2:
            near = [self.local_n_heads * w for w in (width - 1, width + 1) if w > 0]
            found.append(
                f"model_cfg.d_local / model_cfg.local_n_heads ({self.d_local} / {self.local_n_heads} = {width}) must "
                f"be even for rotary positions; nearest d_local: {', '.join(map(str, near))}"
            )
        if self.reach > self.patch_size:
            found.append(
                f"model_cfg.cross_patch_r ({self.reach}) must not exceed model_cfg.patch_size ({self.patch_size}), the "
                f"patch that it is of. Nearest: cross_patch_r={self.patch_size}"
            )
        if self.strided_inference and self.patch_size % 2:
            near = [p for p in (self.patch_size - 1, self.patch_size + 1) if p > 0]
            found.append(
                f"model_cfg.patch_size ({self.patch_size}) must be even for strided_inference, which scores half a "
                f"patch at a time; nearest: {', '.join(map(str, near))}, or strided_inference=false"
            )
        return found
