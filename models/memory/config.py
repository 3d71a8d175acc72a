"""Fields of a memory: its bank, which blocks read it and how, and how chapters of it are chosen.

Symbols: d width, H query heads, G key/value heads, N memory tokens of width m, C chapters of P = N / C tokens, K of
them chosen, S always read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from configs.schema import (
    Execution,
    Free,
    ModelConfig,
    NonNegative,
    NonNegativeFloat,
    OpenFraction,
    Positive,
    Rate,
    divisible,
)
from kernels import AUTO, REFERENCE
from models.layers.init import INIT_STD
from models.vanilla import VanillaConfig

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["MemoryConfig", "MemoryFields", "Strategy"]

Strategy = Literal["sequence", "rolling", "token"]
# YAML has lists; frozen configurations hold tuples.
_AsTuple = BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
Indices = Annotated[tuple[NonNegative, ...], Field(min_length=1), _AsTuple]

# What a placement reads beside its name, and a sharing.
_OF_PLACEMENT = {"memory_layer_k": ("first_k", "last_k"), "memory_layer_n": ("every_n",)}
_OF_CHAPTERS = (
    *("num_chapters", "tokens_per_chapter", "top_k_chapters", "num_shared_chapters", "routed_scaling_factor"),
    *("routing_strategy_train", "routing_strategy_inference", "routing_window_size", "routing_causality"),
    *("chapter_weighting", "use_load_balance_loss", "load_balance_coefficient"),
    *("use_auxiliary_loss", "auxiliary_loss_coefficient", "use_z_loss", "z_loss_coefficient"),
)
_CHAPTERS = {"use_chapters": True}


class MemoryFields(ModelConfig):
    """Those of a memory, whatever reads it: blocks of our own, or of a pretrained base."""

    vanilla_mode: bool = False  # the backbone alone: the control
    num_memory_tokens: Positive = 1024  # N
    memory_dim: Positive | None = None  # m; None = d_model
    memory_num_heads: Positive | None = None  # of attention to it; None = n_heads
    memory_num_kv_heads: Positive | None = None  # None = memory_num_heads, or where that is None n_kv_heads
    memory_layer_placement: Literal["all", "first_k", "last_k", "every_n", "custom", "none"] = "all"
    memory_layer_k: Positive = 5
    memory_layer_n: Positive = 3
    memory_layer_indices: Indices | None = None
    memory_sharing: Literal["shared", "per_layer", "every_k_layers"] = "shared"
    memory_sharing_k: Positive = 2
    memory_block_variant: Literal["A", "B"] = "A"
    use_low_rank_memory: bool = False
    memory_rank: Positive = 64  # r
    low_rank_mode: Literal["factorized", "reduced_dim"] = "factorized"
    use_low_rank_projections: bool = False
    projection_rank: Positive = 64
    quantize_memory: bool = False
    memory_quant_bits: Literal[4, 8] = 8
    wo_init_zero: bool = True
    memory_init_std: Rate = 0.02
    use_chapters: bool = False
    num_chapters: Positive = 100  # C
    tokens_per_chapter: Positive | None = None  # P; None = N / C
    top_k_chapters: Positive = 20  # K
    num_shared_chapters: NonNegative = 0  # S
    routed_scaling_factor: Rate = 1.0
    routing_strategy_train: Strategy = "sequence"
    routing_strategy_inference: Free[Strategy] = "sequence"
    routing_window_size: Positive = 128
    routing_causality: Literal["strict", "lookahead"] = "strict"
    chapter_weighting: Literal["log_bias", "none", "scale_memory"] = "log_bias"
    use_load_balance_loss: Free[bool] = True
    load_balance_coefficient: Free[NonNegativeFloat] = 0.01
    use_auxiliary_loss: Free[bool] = False
    auxiliary_loss_coefficient: Free[NonNegativeFloat] = 0.01
    use_z_loss: Free[bool] = False
    z_loss_coefficient: Free[NonNegativeFloat] = 0.001

    tiny = {
        "num_memory_tokens": 16,
        "memory_rank": 8,
        "projection_rank": 8,
        "num_chapters": 4,
        "top_k_chapters": 2,
        "routing_window_size": 8,
    }
    examples = {
        "memory_layer_placement": ("first_k", {"memory_layer_k": 1}),
        "memory_layer_k": (1, {"memory_layer_placement": "first_k", "memory_layer_k": 2}),
        "memory_layer_n": (1, {"memory_layer_placement": "every_n", "memory_layer_n": 2}),
        "memory_layer_indices": ((0,), {"memory_layer_placement": "custom", "memory_layer_indices": (0, 1)}),
        "memory_sharing_k": (1, {"memory_sharing": "every_k_layers"}),
        "memory_rank": (4, {"use_low_rank_memory": True}),
        "low_rank_mode": ("reduced_dim", {"use_low_rank_memory": True}),
        "projection_rank": (4, {"use_low_rank_projections": True}),
        "memory_quant_bits": (4, {"quantize_memory": True}),
        "num_chapters": (8, _CHAPTERS),
        "top_k_chapters": (1, _CHAPTERS),
        "num_shared_chapters": (1, _CHAPTERS),
        "routed_scaling_factor": (4.0, {**_CHAPTERS, "num_shared_chapters": 1}),
        "routing_strategy_train": ("token", _CHAPTERS),
        "routing_strategy_inference": ("token", _CHAPTERS),
        "routing_window_size": (4, _CHAPTERS),
        "routing_causality": ("lookahead", _CHAPTERS),
        "chapter_weighting": ("none", _CHAPTERS),
        "use_load_balance_loss": (False, _CHAPTERS),
        "load_balance_coefficient": (0.5, _CHAPTERS),
        "use_auxiliary_loss": (True, _CHAPTERS),
        "auxiliary_loss_coefficient": (0.5, {**_CHAPTERS, "use_auxiliary_loss": True}),
        "use_z_loss": (True, _CHAPTERS),
        "z_loss_coefficient": (0.5, {**_CHAPTERS, "use_z_loss": True}),
    }
    rare = {"tokens_per_chapter": "what is given must be what it is; another number is refused"}


class MemoryConfig(MemoryFields, VanillaConfig):
    dropout: Free[OpenFraction] = 0.0
    attention_dropout: Free[OpenFraction | None] = None  # of the backbone's probabilities; None = dropout
    use_flash_attention: Execution[bool] = True  # False: the backbone's attention by its plain definition
    initializer_range: Rate = INIT_STD  # of matrices that do not write to the residual stream

    examples = {"attention_dropout": 0.2}

    # -- what follows from the fields ------------------------------------------------------------------------------

    @property
    def memory_layers(self) -> list[int]:
        """Blocks that read the memory, rising."""
        last = self.n_layers
        found = {
            "all": range(last),
            "first_k": range(min(self.memory_layer_k, last)),
            "last_k": range(max(0, last - self.memory_layer_k), last),
            "every_n": range(0, last, self.memory_layer_n),
            "custom": sorted(self.memory_layer_indices or ()),
            "none": (),
        }[self.memory_layer_placement]
        return [] if self.vanilla_mode else [*found]

    @property
    def bank_of(self) -> dict[int, int]:
        """Of each block that reads the memory, which bank."""
        size = {"shared": self.n_layers, "per_layer": 1, "every_k_layers": self.memory_sharing_k}
        return {layer: i // size[self.memory_sharing] for i, layer in enumerate(self.memory_layers)}

    @property
    def reduced(self) -> bool:
        return self.use_low_rank_memory and self.low_rank_mode == "reduced_dim"

    @property
    def factorized(self) -> bool:
        return self.use_low_rank_memory and self.low_rank_mode == "factorized"

    @property
    def token_width(self) -> int:
        """m, or r where attention runs in that width."""
        return self.memory_rank if self.reduced else self.memory_dim or self.d_model

    @property
    def attention_width(self) -> int:
        """H e."""
        return self.memory_rank if self.reduced else self.d_model

    @property
    def memory_heads(self) -> tuple[int, int]:
        """(H, G) of attention to the memory."""
        own = self.memory_num_heads
        return own or self.n_heads, self.memory_num_kv_heads or own or self.kv_heads

    @property
    def memory_head_width(self) -> int:
        return self.attention_width // self.memory_heads[0]

    @property
    def memory_kv_width(self) -> int:
        return self.memory_head_width * self.memory_heads[1]

    @property
    def routed(self) -> bool:
        """Whether any block chooses chapters."""
        return self.use_chapters and bool(self.memory_layers)

    @property
    def chapter_size(self) -> int:
        """P"""
        return self.num_memory_tokens // self.num_chapters

    @property
    def routed_chapters(self) -> int:
        return self.num_chapters - self.num_shared_chapters

    @property
    def keys_per_token(self) -> int:
        """Memory tokens that a token attends to in a block."""
        if not self.use_chapters:
            return self.num_memory_tokens
        return (self.num_shared_chapters + self.top_k_chapters) * self.chapter_size

    @property
    def without(self) -> str:
        """The field and value by which no block reads a memory; "" where some does."""
        if self.memory_layers:
            return ""
        return "vanilla_mode=true" if self.vanilla_mode else "memory_layer_placement=none"

    @property
    def looks_ahead(self) -> bool:
        return self.routed and self.routing_causality == "lookahead"

    # -- what is wrong ---------------------------------------------------------------------------------------------

    def problems(self, run: RunConfig) -> list[str]:
        found = super().problems(run)
        asked = run.kernels.get("attention", AUTO)
        if not self.use_flash_attention and asked not in (AUTO, REFERENCE):
            found.append(
                f"model_cfg.use_flash_attention=false is kernels.attention={REFERENCE}, and kernels.attention is "
                f"{asked}. Leave out one of the two"
            )
        if self.use_rope and run.train_seq_len > self.n_ctx:  # a table of positions says it by itself
            found.append(
                f"train_seq_len ({run.train_seq_len}) must not exceed model_cfg.n_ctx ({self.n_ctx}). Nearest: "
                f"train_seq_len={self.n_ctx}, or model_cfg.n_ctx={run.train_seq_len}"
            )
        return found + self.memory_problems()

    def memory_problems(self) -> list[str]:
        """Of the memory alone."""
        if self.vanilla_mode:
            return []
        found = self._placement_problems() + self._head_problems() + self._width_problems()
        if self.use_chapters:
            found += self._chapter_problems()
        for name in ("use_auxiliary_loss", "use_z_loss"):
            if getattr(self, name) and not self.use_chapters:
                found.append(
                    f"model_cfg.{name} is of routers, and without model_cfg.use_chapters there is none. Set "
                    f"use_chapters=true, or {name}=false"
                )
        return found

    def _placement_problems(self) -> list[str]:
        placement, given, layers = self.memory_layer_placement, self.memory_layer_indices, self.n_layers
        found = []
        if placement in _OF_PLACEMENT["memory_layer_k"] and self.memory_layer_k > layers:
            found.append(
                f"model_cfg.memory_layer_k ({self.memory_layer_k}) must not exceed model_cfg.n_layers ({layers}). "
                f"Nearest: memory_layer_k={layers}"
            )
        if placement == "custom" and given is None:
            found.append(
                f"model_cfg.memory_layer_placement=custom needs model_cfg.memory_layer_indices, a list of blocks, as "
                f"[0, {layers - 1}]"
            )
        elif placement != "custom" and given is not None:
            found.append(
                f"model_cfg.memory_layer_indices ({list(given)}) is read with memory_layer_placement=custom alone, and "
                f"that is {placement}. Leave out one of the two"
            )
        elif given is not None:
            if beyond := sorted(i for i in given if i >= layers):
                found.append(
                    f"model_cfg.memory_layer_indices: there is no block {beyond[0]}; valid are 0..{layers - 1}"
                )
            if twice := sorted({i for i in given if given.count(i) > 1}):
                found.append(f"model_cfg.memory_layer_indices names block {twice[0]} twice; name it once")
        return found

    def _head_problems(self) -> list[str]:
        (heads, groups), own, found = self.memory_heads, self.memory_num_heads, []
        if own is not None and not self.reduced:
            found += divisible("d_model", self.d_model, "memory_num_heads", heads)
        if (own, self.memory_num_kv_heads) != (None, None) and heads % groups:
            legal = [n for n in range(1, heads + 1) if heads % n == 0]
            near = [max(n for n in legal if n < groups), *[n for n in legal if n > groups][:1]]
            found.append(
                f"model_cfg.memory_num_kv_heads ({groups}) must divide model_cfg."
                f"{'n_heads' if own is None else 'memory_num_heads'} ({heads}); nearest: "
                f"{' or '.join(map(str, near))}"
            )
        return found

    def _width_problems(self) -> list[str]:
        found, rank, heads = [], self.memory_rank, self.memory_heads[0]
        if self.reduced:
            if rank % heads:
                near = [n for n in (rank // heads * heads, -(-rank // heads) * heads) if n]
                name = "n_heads" if self.memory_num_heads is None else "memory_num_heads"
                found.append(
                    f"model_cfg.memory_rank ({rank}) must be divisible by model_cfg.{name} ({heads}) with "
                    f"low_rank_mode=reduced_dim; nearest: {' or '.join(map(str, near))}"
                )
            for name, is_set in (
                ("memory_dim", self.memory_dim is not None),
                ("use_low_rank_projections", self.use_low_rank_projections),
            ):
                if is_set:
                    found.append(
                        f"model_cfg.{name} has no meaning with low_rank_mode=reduced_dim, whose width is memory_rank "
                        f"({rank}). Leave out one of the two"
                    )
        elif self.factorized and rank > (most := min(self.num_memory_tokens, self.token_width)):
            found.append(
                f"model_cfg.memory_rank ({rank}) must not exceed the sides of the bank, {self.num_memory_tokens} x "
                f"{self.token_width}. Nearest: memory_rank={most}"
            )
        if self.use_low_rank_projections and not self.reduced:
            most = min(self.d_model, self.token_width, self.memory_kv_width) - 1
            if self.projection_rank > most:
                found.append(
                    f"model_cfg.projection_rank ({self.projection_rank}) must be less than the sides of what it stands "
                    f"for, {self.d_model} x {self.d_model} and {self.token_width} x {self.memory_kv_width}. Nearest: "
                    + (f"projection_rank={most}" if most else "use_low_rank_projections=false")
                )
        name, width = ("memory_rank", rank) if self.use_low_rank_memory else ("memory_dim", self.token_width)
        if self.quantize_memory and self.memory_quant_bits == 4 and width % 2:
            found.append(
                f"model_cfg.memory_quant_bits=4 puts two numbers in a byte, and rows of model_cfg.{name} ({width}) are "
                f"odd. Nearest: {name}={width - 1} or {width + 1}"
                + (", or memory_quant_bits=8" if width == 1 else "")
            )
        return found

    def _chapter_problems(self) -> list[str]:
        n, chapters, shared, found = self.num_memory_tokens, self.num_chapters, self.num_shared_chapters, []
        if n % chapters:
            multiples = [size for size in (n // chapters * chapters, -(-n // chapters) * chapters) if size]
            divisors = [c for c in range(1, n + 1) if n % c == 0]
            near = [max(c for c in divisors if c < chapters), *[c for c in divisors if c > chapters][:1]]
            found.append(
                f"model_cfg.num_memory_tokens ({n}) must be divisible by model_cfg.num_chapters ({chapters}); nearest: "
                f"num_memory_tokens {' or '.join(map(str, multiples))}, num_chapters {' or '.join(map(str, near))}"
            )
        elif self.tokens_per_chapter not in (None, self.chapter_size):
            found.append(
                f"model_cfg.tokens_per_chapter ({self.tokens_per_chapter}) must be num_memory_tokens / num_chapters = "
                f"{self.chapter_size}: leave it out"
            )
        if shared >= chapters:
            found.append(
                f"model_cfg.num_shared_chapters ({shared}) leaves none of model_cfg.num_chapters ({chapters}) to "
                f"choose from. Nearest: num_shared_chapters={chapters - 1}"
            )
        elif self.top_k_chapters > chapters - shared:
            what = f"num_chapters ({chapters})" + (f" less num_shared_chapters ({shared})" if shared else "")
            found.append(
                f"model_cfg.top_k_chapters ({self.top_k_chapters}) must not exceed {what}. Nearest: "
                f"top_k_chapters={chapters - shared}"
            )
        return found

    def remarks(self, run: RunConfig) -> list[str]:
        return super().remarks(run) + self.memory_remarks(run)

    def memory_remarks(self, run: RunConfig) -> list[str]:
        """Of the memory alone."""
        found = []
        if self.looks_ahead and "sequence" in (self.routing_strategy_train, self.routing_strategy_inference):
            found.append(
                "model_cfg.routing_causality=lookahead lets a token see later ones by way of its chapters: no score of "
                "this run is one of text that is yet to come, and each is marked non_causal_routing"
            )
        strict = self.routed and not self.looks_ahead and self.routing_strategy_train == "sequence"
        if strict and self.routing_window_size >= run.train_seq_len:
            found.append(
                f"model_cfg.routing_window_size ({self.routing_window_size}) is no less than train_seq_len "
                f"({run.train_seq_len}): no router ever decides by what it reads, nor learns"
            )
        return found

    def unread(self) -> dict[str, str]:
        found = super().unread()
        fields = MemoryFields.model_fields.keys() - ModelConfig.model_fields.keys()
        if why := self.without:
            named = {"vanilla_mode", *(() if self.vanilla_mode else ("memory_layer_placement",))}
            return found | dict.fromkeys(fields - named, why)
        for name, placements in _OF_PLACEMENT.items():
            if self.memory_layer_placement not in placements:
                found[name] = f"memory_layer_placement={self.memory_layer_placement}"
        if self.memory_sharing != "every_k_layers":
            found["memory_sharing_k"] = f"memory_sharing={self.memory_sharing}"
        found |= self._unread_of_switches()
        if self.use_chapters:
            read = (self.routing_strategy_train, self.routing_strategy_inference)
            if "sequence" not in read:
                found["routing_causality"] = f"routing_strategy_train={read[0]} and no sequence"
            if set(read) == {"token"}:
                found["routing_window_size"] = "routing_strategy_train=token"
        return found

    def _unread_of_switches(self) -> dict[str, str]:
        switches: dict[str, tuple[str, ...]] = {
            "use_low_rank_memory": ("memory_rank", "low_rank_mode"),
            "use_low_rank_projections": ("projection_rank",),
            "quantize_memory": ("memory_quant_bits",),
            "use_load_balance_loss": ("load_balance_coefficient",),
            "use_auxiliary_loss": ("auxiliary_loss_coefficient",),
            "use_z_loss": ("z_loss_coefficient",),
            "use_chapters": _OF_CHAPTERS,
        }
        found: dict[str, Any] = {}
        for switch, fields in switches.items():
            if not getattr(self, switch):
                found |= dict.fromkeys(fields, f"{switch}=false")
        return found
