"""The fields of hierarchies that cut chunks, those of hnet, and what follows from them for each stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from configs.match import SizeDials
from configs.schema import Execution, Free, ModelConfig, NonNegative, Positive, Rate, byte_vocabulary
from models.hierarchy.dials import hierarchy_dials
from models.hierarchy.layout import Stage, stages_of
from models.sparse.config import NSAConfig
from models.state_space.config import MambaConfig

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["HNetConfig", "HierarchyConfig", "StageSizes"]

BYTES_PER_TOKEN = 4.6  # of GPT-2's tokens, which rates are tuned for (Hwang et al. 2025, section 2.3.3)
USUAL_HEAD = 64  # width of a head where nothing says another
FFN_MULTIPLE = 128  # that hidden widths are rounded up to


def _yaml(value: Any) -> str:
    """As one writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return "null" if value is None else str(value)


def _layout(value: list[Any]) -> list[Any]:
    stages_of(value)
    return value


Ratio = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Layout = Annotated[list[Any], AfterValidator(_layout)]
Window = Annotated[int, Field(ge=-1)]


@dataclass(frozen=True)
class StageSizes:
    """One stage. `layers`: kinds of layers of (encoder, decoder), or (main,); `window`: positions that a position sees,
    itself included (None: all); `ratio`: positions of this stage in a chunk, as aimed at (None of the innermost);
    `sparse`: what its attention is, where that is sparse: heads, positions and window of its own."""

    layers: Stage
    width: int
    hidden: int
    heads: int
    turning: int
    window: int | None
    ratio: float | None
    sparse: NSAConfig | None = None

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def residuals(self) -> int:
        """What is added to the residual stream, in all layers."""
        return sum(2 if kind.isupper() else 1 for stack in self.layers for kind in stack)


class HierarchyConfig(ModelConfig):
    """What every such hierarchy has. Lists are of all stages, from the outermost in."""

    unit = "byte"

    vocab_size: Positive | None = None
    n_ctx: Positive = 8192
    d_model: Positive | list[Positive] = 768  # one number: of the innermost, the others 2/3 of it
    d_intermediate: list[NonNegative] | None = None  # None = 8/3 d_model where a layer has one
    d_state: Positive = 128  # of each channel of Mamba-2
    expand: Positive = 2
    d_conv: Positive = 4
    headdim: Positive = 64
    chunk_size: Free[Positive] = 64  # positions that Mamba-2 computes at once as attention is
    norm_eps: Rate = 1e-5
    tie_embeddings: bool = False
    chunking: Literal["dynamic", "fixed"] = "dynamic"
    ratio_loss_weight: Free[Rate] = 0.03
    ratio_over: Free[Literal["row", "batch"]] = "row"
    ema_eps: Annotated[float, Field(ge=0, lt=0.5)] = 1e-4
    lr_multiplier: Free[Literal["auto"] | list[Rate]] = "auto"
    chunk_execution: Execution[Literal["auto", "packed", "padded", "masked"]] = "auto"

    tiny = {"n_ctx": 32, "d_model": 64, "headdim": 16, "d_state": 8}
    examples = {
        "d_model": [64, 64],
        "d_intermediate": [0, 128],
        "chunk_size": 8,
        "ratio_over": "batch",
        "lr_multiplier": [1.0, 2.0],
        "ema_eps": 0.1,
    }

    # -- what a subclass says ----------------------------------------------------------------------------------------

    pools: ClassVar[bool] = False  # whether chunks of one length are made of all that they hold
    attention_lists: ClassVar[tuple[str, ...]] = ()  # those that attention reads alone; null elsewhere
    stage_lists: ClassVar[tuple[str, ...]] = ("d_model", "d_intermediate", "lr_multiplier")
    counted_by: ClassVar[str] = "model_cfg.arch_layout"  # the field that says how many stages there are
    laid_out_by: ClassVar[str] = "arch_layout"  # the one that says of which layers the outer ones are

    @property
    def layout(self) -> list[Any]:
        """As `models/hierarchy/layout.py` reads it."""
        raise NotImplementedError(f"{type(self).__name__} must define layout")

    @property
    def heads(self) -> list[int]:
        """Of attention that is not sparse, of each stage; any number where there is none."""
        raise NotImplementedError(f"{type(self).__name__} must define heads")

    @property
    def ratios(self) -> list[float]:
        """N of each stage that cuts chunks."""
        raise NotImplementedError(f"{type(self).__name__} must define ratios")

    def turning(self, stage: int) -> int | None:
        """Dims of a head that turn, of attention that is not sparse. None: half of it, in whole pairs."""
        return None

    def before(self, stage: int) -> int:
        """Positions before a position that attention sees which is not sparse, -1 = all."""
        return -1 if stage == len(self.kinds) - 1 else 1023

    def sparse(self, stage: int) -> NSAConfig | None:
        """What attention of a stage is, where it is sparse."""
        return None

    def ratio_problem(self, number: int, ratio: float) -> str:
        """What to say of chunks that are to be of one length, which is not whole."""
        raise NotImplementedError(f"{type(self).__name__} must define ratio_problem")

    depth_field: ClassVar[str] = "n_layers"  # layers of the innermost stage

    def size_dials(self) -> SizeDials:
        return hierarchy_dials(self, self.depth_field, FFN_MULTIPLE)

    # -- what follows for each stage -------------------------------------------------------------------------------

    @property
    def kinds(self) -> list[Stage]:
        return stages_of(self.layout)

    @property
    def widths(self) -> list[int]:
        if isinstance(self.d_model, list):
            return self.d_model
        outer = max(1, round(2 * self.d_model / (3 * self.headdim))) * self.headdim
        return [*(min(outer, self.d_model),) * (len(self.kinds) - 1), self.d_model]

    @property
    def stages(self) -> list[StageSizes]:
        found = []
        for stage, (layers, width, heads) in enumerate(zip(self.kinds, self.widths, self.heads, strict=True)):
            last = stage == len(self.kinds) - 1
            feeds = any(kind.isupper() for stack in layers for kind in stack)
            hidden = 8 * width / 3 if feeds else 0
            if self.d_intermediate is not None:
                hidden = self.d_intermediate[stage]
            turning, before = self.turning(stage), self.before(stage)
            found.append(
                StageSizes(
                    layers,
                    width,
                    FFN_MULTIPLE * math.ceil(hidden / FFN_MULTIPLE),
                    heads,
                    width // heads // 4 * 2 if turning is None else turning,
                    None if before < 0 else before + 1,
                    None if last else self.ratios[stage],
                    self.sparse(stage) if set("".join(layers)) & {"t", "T"} else None,
                )
            )
        return found

    @property
    def lr_multipliers(self) -> list[float]:
        """lambda^s = sqrt(N_GPT * prod_{i >= s} N^i / prod_i N^i * D^S / D^s) (Hwang et al. 2025, section 2.3.3)."""
        if self.lr_multiplier != "auto":
            return self.lr_multiplier
        ratios, widths = [*self.ratios, 1.0], self.widths
        return [
            math.sqrt(
                BYTES_PER_TOKEN * math.prod(ratios[stage:]) / math.prod(ratios) * widths[-1] / widths[stage]
            )
            for stage in range(len(widths))
        ]

    def mixer(self, width: int) -> MambaConfig:
        """Of the Mamba-2 layers of a stage. Weights begin as H-Net's do, which divide by depth elsewhere."""
        return MambaConfig(
            version=2,
            d_model=width,
            d_state=self.d_state,
            expand=self.expand,
            d_conv=self.d_conv,
            headdim=self.headdim,
            chunk_size=self.chunk_size,
            norm_eps=self.norm_eps,
            rescale_prenorm_residual=False,
        )

    # -- what does not fit -----------------------------------------------------------------------------------------

    def problems(self, run: RunConfig) -> list[str]:
        found = super().problems(run) + byte_vocabulary(self.vocab_size) + self.conflicts()
        found = found or self._lengths()
        # A run that goes on may be older than the rule of `_nobodys`, and says no other thing by such numbers.
        if not found and (run is None or run.resume == "none"):
            found = self._nobodys()
        return found or self._of_stages()

    def conflicts(self) -> list[str]:
        """Fields that say the same, or nothing, of how many layers there are; the others are looked at only without."""
        return []

    def _lengths(self) -> list[str]:
        stages, found = len(self.kinds), []
        for name in self.stage_lists:
            value = getattr(self, name)
            wanted = stages - (name == "target_ratio")
            if isinstance(value, list) and len(value) != wanted:
                what = "stages that cut chunks" if name == "target_ratio" else "stages"
                nearest = (value + value[-1:] * wanted)[:wanted] or type(self).model_fields[name].default
                found.append(
                    f"model_cfg.{name} ({_yaml(value)}) has {len(value)} numbers, and {self.counted_by} {wanted} "
                    f"{what}. Nearest: {_yaml(nearest)}"
                )
        return found

    def _nobodys(self) -> list[str]:
        """Numbers of stages none of whose layers reads them."""
        every, found = ["".join(stage) for stage in self.kinds], []
        for names, needed, what, none in (
            (self.attention_lists, "tT", "attention", None),
            (("d_intermediate",), "MT", "a feed-forward layer", 0),
        ):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, list):
                    continue
                nearest = [
                    n if set(needed) & set(kinds) else none for n, kinds in zip(value, every, strict=True)
                ]
                if wrong := [str(stage) for stage, n in enumerate(value) if n != nearest[stage]]:
                    found.append(
                        f"model_cfg.{name} ({_yaml(value)}) has a number for stage {', '.join(wrong)}, and no layer "
                        f"there has {what} to read it. Nearest: {_yaml(nearest)}"
                    )
        return found

    def _of_stages(self) -> list[str]:
        found = []
        if self.widths != sorted(self.widths):
            found.append(
                f"model_cfg.d_model ({self.widths}) must not fall from the outermost stage in: chunks are padded, "
                f"never cut. Nearest: {sorted(self.widths)}"
            )
        for number, stage in enumerate(self.stages):
            kinds = "".join(stage.layers)
            if set(kinds) & {"m", "M"} and self.expand * stage.width % self.headdim:
                legal = [
                    n for n in range(1, self.expand * stage.width + 1) if self.expand * stage.width % n == 0
                ]
                nearest = min(legal, key=lambda n: abs(n - self.headdim))
                found.append(
                    f"model_cfg.expand times the width of stage {number} ({self.expand} * {stage.width}) must be "
                    f"divisible by model_cfg.headdim ({self.headdim}). Nearest: headdim={nearest}"
                )
            if set(kinds) & {"t", "T"} and stage.sparse is None:
                found += self._of_attention(number, stage)
            if kinds.lower() != kinds and not stage.hidden:
                found.append(
                    f"model_cfg.d_intermediate of stage {number} is 0, and its layers M and T have a feed-forward "
                    f"layer. Nearest: {round(8 * stage.width / 3)}, or m and t in model_cfg.arch_layout"
                )
            if self.chunking == "fixed" and stage.ratio is not None and stage.ratio != int(stage.ratio):
                found.append(self.ratio_problem(number, stage.ratio))
        return found

    def _of_attention(self, number: int, stage: StageSizes) -> list[str]:
        if stage.width % stage.heads:
            legal = [n for n in range(1, stage.width + 1) if stage.width % n == 0]
            nearest = min(legal, key=lambda n: abs(n - stage.heads))
            return [
                f"the width of stage {number} ({stage.width}) must be divisible by its heads, model_cfg.n_heads "
                f"({stage.heads}). Nearest: {nearest}"
            ]
        if stage.head_width % 2:
            return [
                f"heads of stage {number} (model_cfg.d_model / model_cfg.n_heads) are {stage.head_width} wide, which "
                f"must be even. Nearest: model_cfg.d_model={stage.heads * (stage.head_width + 1)}"
            ]
        if stage.turning % 2 or stage.turning > stage.head_width:
            nearest = min(stage.turning // 2 * 2, stage.head_width // 2 * 2)
            return [
                f"model_cfg.rotary_emb_dim of stage {number} ({stage.turning}) must be even and at most the width of a "
                f"head ({stage.head_width}). Nearest: {nearest}"
            ]
        return []

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if self.chunking == "fixed":
            found |= dict.fromkeys(("ratio_loss_weight", "ratio_over"), "chunking=fixed")
        if "m" not in self._codes.lower():
            found |= dict.fromkeys(("d_state", "expand", "d_conv", "chunk_size"), self._without("Mamba-2"))
        return found

    @property
    def _codes(self) -> str:
        """Kinds of all layers, of whatever stage."""
        return "".join(stack for stage in self.kinds for stack in stage)

    def _without(self, what: str) -> str:
        field = self.laid_out_by
        return f"{field}={getattr(self, field)}, which has no {what}"


class HNetConfig(HierarchyConfig):
    """Defaults are a model of one stage of 121 million parameters. Lists are of all stages, from the outermost in."""

    arch_layout: Layout | None = None  # None: of the next two
    n_layers: Positive | None = 15  # of the innermost stage, attention and feed-forward each
    num_compression_layers: Positive | None = 4  # of the encoder and of the decoder, Mamba-2
    # Of these three a stage without attention has None.
    n_heads: Positive | list[Positive | None] = 12  # one number: of the innermost, the others' as wide
    rotary_emb_dim: list[NonNegative | None] | None = None  # dims of a head that turn; None = half of it
    window_size: list[Window | None] | None = None  # positions before a position that it sees, -1 = all
    target_ratio: Ratio | list[Ratio] | None = None  # None = 6 of one stage, 3 of each of several
    compression_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None  # 1 / target_ratio of every stage

    tiny = {"n_heads": 4, "n_layers": 2, "num_compression_layers": 1, "target_ratio": 2.0}
    examples = {
        "arch_layout": (
            ["m1", ["t1"], "m1"],
            {"arch_layout": ["m1", ["T1"], "m1"], "n_layers": None, "num_compression_layers": None},
        ),
        "n_heads": [None, 8],
        "rotary_emb_dim": [None, 4],
        "window_size": [None, 3],
        "target_ratio": 3.0,
        "compression_ratio": (0.25, {"target_ratio": None}),
    }
    attention_lists = ("n_heads", "rotary_emb_dim", "window_size")
    stage_lists = (*HierarchyConfig.stage_lists, *attention_lists, "target_ratio")

    @property
    def layout(self) -> list[Any]:
        if self.arch_layout is not None:
            return self.arch_layout
        outer = f"m{self.num_compression_layers}"
        return [outer, [f"T{self.n_layers}"], outer]

    @property
    def heads(self) -> list[int]:
        """Of attention."""
        if isinstance(self.n_heads, list):
            return [heads or 1 for heads in self.n_heads]
        width = self.widths[-1] / self.n_heads
        return [*(max(1, round(outer / width)) for outer in self.widths[:-1]), self.n_heads]

    @property
    def ratios(self) -> list[float]:
        """N of each stage that cuts chunks."""
        outer = len(self.kinds) - 1
        if isinstance(self.target_ratio, list):
            return self.target_ratio
        if self.compression_ratio is not None:
            return [1 / self.compression_ratio] * outer
        return [self.target_ratio or (6.0 if outer == 1 else 3.0)] * outer

    def turning(self, stage: int) -> int | None:
        return None if self.rotary_emb_dim is None else self.rotary_emb_dim[stage]

    def before(self, stage: int) -> int:
        window = None if self.window_size is None else self.window_size[stage]
        return super().before(stage) if window is None else window

    def conflicts(self) -> list[str]:
        found = []
        for name in ("n_layers", "num_compression_layers"):
            if self.arch_layout is not None and getattr(self, name) is not None:
                found.append(
                    f"model_cfg.{name} ({getattr(self, name)}) and model_cfg.arch_layout both say how many layers "
                    f"there are. Nearest: {name}=null, or arch_layout=null"
                )
            if self.arch_layout is None and getattr(self, name) is None:
                default = type(self).model_fields[name].default
                found.append(
                    f"model_cfg.{name} and model_cfg.arch_layout are both null, and neither says how many layers there "
                    f"are. Nearest: {name}={default}"
                )
        if self.compression_ratio is not None and self.target_ratio is not None:
            found.append(
                f"model_cfg.compression_ratio ({self.compression_ratio}) and model_cfg.target_ratio "
                f"({self.target_ratio}) both say how long chunks are to be. Nearest: compression_ratio=null"
            )
        if self.arch_layout is not None and len(self.kinds) == 1:
            found.append(
                f"model_cfg.arch_layout ({self.layout}) cuts no chunks: it has one stage. Nearest: "
                f"['m4', {self.layout}, 'm4']"
            )
        return found

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if "t" not in self._codes.lower():
            unread = ("n_heads", "rotary_emb_dim", "window_size")
            found |= dict.fromkeys(unread, self._without("attention"))
        if self._codes == self._codes.lower():
            found["d_intermediate"] = self._without("feed-forward layer")
        return found

    def _of_attention(self, number: int, stage: StageSizes) -> list[str]:
        if isinstance(self.n_heads, list) and self.n_heads[number] is None:
            return [
                f"model_cfg.n_heads ({_yaml(self.n_heads)}) is null for stage {number}, which has attention. Nearest: "
                f"{max(1, round(stage.width / USUAL_HEAD))}"
            ]
        return super()._of_attention(number, stage)

    def ratio_problem(self, number: int, ratio: float) -> str:
        if self.compression_ratio is not None:
            return (
                f"1 / model_cfg.compression_ratio ({self.compression_ratio}) must be a whole number where "
                f"model_cfg.chunking is fixed. Nearest: target_ratio={max(2, round(ratio))} and compression_ratio=null"
            )
        return (
            f"model_cfg.target_ratio of stage {number} ({ratio}) must be a whole number where model_cfg.chunking is "
            f"fixed. Nearest: {max(2, round(ratio))}"
        )
