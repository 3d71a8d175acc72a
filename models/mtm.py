"""Sequential multi-token modules (DeepSeek-AI 2024, DeepSeek-V3, arXiv:2412.19437, section 2.2).

A decoder of another type, the trunk, and D modules behind it. Module k reads at each position the state of the one
before (of the first: of the trunk) and the embedding of the k-th real token behind it, runs one block of the trunk's
kind over all positions, and predicts the token after that one. Embedding and output matrix are the trunk's own. The
trunk's predictions do not depend on the modules, which are dropped where text is scored or written.

Shapes: B rows, T tokens, D width, V_p padded vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from torch import Tensor, nn

import models
from configs.explain import explain
from configs.files import fold_names
from configs.match import Dial, SizeDials
from configs.messages import ARCHITECTURE_ALIASES, suggest_key
from configs.schema import DefaultModelConfig, Dropout, Fraction, Free, NonNegative, NonNegativeFloat
from models.drafters import ModuleDrafter
from models.layers.cache import Cache, KVCache
from models.layers.decoder import Decoder, Hidden, further, through
from models.layers.experts import active_parameters
from models.layers.flops import Flops, matmul_flops
from models.layers.nextn import from_nextn, to_nextn
from models.layers.roles import Rule
from naming import load

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["MTM", "MTMConfig", "MTPModule"]


def _folded(given: Any) -> Any:
    if isinstance(given, dict):
        fold_names(given := dict(given), ARCHITECTURE_ALIASES, "model_cfg.trunk_cfg.")
    return given


def _model_class(type_: str) -> Any:
    return load(models.resolve(type_).model)


class MTMConfig(DefaultModelConfig):
    dropout: Free[Dropout] = 0.0  # of embeddings, attention probabilities and what blocks add
    n_mtp_modules: NonNegative = 1  # D
    mtp_lambda: Free[NonNegativeFloat] = 0.3  # weight of the mean of the modules' losses
    mtp_lambda_final: Free[NonNegativeFloat | None] = None  # from the switch on; None = as before
    mtp_lambda_switch: Free[Fraction] = 0.68  # share of the training
    mtp_hidden: Literal["post_norm", "pre_norm"] = (
        "post_norm"  # the trunk's state that the first module reads
    )
    concat_order: Literal["hidden_first", "embed_first"] = "hidden_first"
    mtp_share_head_norm: bool = (
        False  # the trunk's last norm before the output matrix, instead of one per module
    )
    trunk: Literal["vanilla", "gpt2", "moe"] = "vanilla"
    # Fields of the trunk's own Config, beyond those above that it has too. What is not given has its default there.
    trunk_cfg: Annotated[dict[str, Any], BeforeValidator(_folded)] = Field({}, validate_default=True)

    examples = {
        "mtp_lambda_final": (0.1, {"mtp_lambda_switch": 0.25}),
        "mtp_lambda_switch": (0.25, {"mtp_lambda_final": 0.1}),
        "trunk": ("gpt2", {"trunk_cfg": {}}),
        "trunk_cfg": {"norm_eps": 0.1},
    }

    @field_validator("trunk_cfg")
    @classmethod
    def _complete(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Of whatever is given all is stated, so that a run's record says what it was trained with."""
        if "trunk" not in info.data:
            return given
        fields = _model_class(info.data["trunk"]).Config.model_fields
        defaults = {
            name: field.get_default() for name, field in fields.items() if name not in cls.model_fields
        }
        return {**defaults, **given}

    @property
    def tokens_ahead(self) -> int:
        """Tokens predicted at each position."""
        return 1 + self.n_mtp_modules

    @property
    def trunk_class(self) -> Any:
        return _model_class(self.trunk)

    @property
    def trunk_config(self) -> DefaultModelConfig:
        return self.trunk_class.Config(**self._shared, **self.trunk_cfg)

    @property
    def _shared(self) -> dict[str, Any]:
        """What the trunk has of this Config."""
        fields = self.trunk_class.Config.model_fields
        return {name: getattr(self, name) for name in type(self).model_fields if name in fields}

    def size_dials(self) -> SizeDials:
        """The trunk's: what it has of its own stands in `trunk_cfg`."""
        own = self.trunk_config.size_dials()

        def mine(dial: Dial) -> Dial:
            names = {
                name: name if name in self._shared else f"trunk_cfg.{name}" for name in dial.fields(dial.at)
            }
            return replace(dial, fields=lambda n: {names[k]: v for k, v in dial.fields(n).items()})

        width, depth = (dial and mine(dial) for dial in (own.width, own.depth))
        return SizeDials(width, depth, tuple(map(mine, own.fine)))

    def loss_weights(self, done: float) -> list[float]:
        """Of the trunk and of each module; `done`: share of the training that lies behind."""
        final = self.mtp_lambda_final
        weight = self.mtp_lambda if final is None or done < self.mtp_lambda_switch else final
        return [1.0, *(weight / self.n_mtp_modules for _ in range(self.n_mtp_modules))]

    def problems(self, run: RunConfig) -> list[str]:
        if wrong := self._wrong_in_trunk_cfg():
            return super().problems(run) + wrong
        own = "|".join(self.trunk_class.Config.model_fields.keys() - self._shared)
        found = self.trunk_config.problems(run)
        found = [re.sub(rf"\bmodel_cfg\.(?=({own})\b)", "model_cfg.trunk_cfg.", problem) for problem in found]
        return [re.sub(r"\btype=", "model_cfg.trunk=", problem) for problem in found]

    def _wrong_in_trunk_cfg(self) -> list[str]:
        config_class, shared, place = self.trunk_class.Config, self._shared, "model_cfg.trunk_cfg."
        fields = config_class.model_fields
        own = [name for name in fields if name not in shared]
        found = []
        for name in self.trunk_cfg:
            if name in shared:
                found.append(f"{place}{name}: the trunk has the model's own. Set model_cfg.{name} instead")
            elif name not in fields:
                hint = suggest_key(place + name, own) or f" It has {', '.join(own)}"
                found.append(f"unknown key '{place}{name}' for trunk '{self.trunk}'.{hint}")
        given = {name: value for name, value in self.trunk_cfg.items() if name in own}
        try:
            config_class.model_validate({**shared, **given})
        except ValidationError as error:
            found += [problem for _, problem in explain(error, config_class, given, lambda key: "", place)]
        return found

    def unread(self) -> dict[str, str]:
        place = {name: "trunk_cfg." for name in self.trunk_cfg}
        found = {
            place.get(name, "") + name: place.get(why.partition("=")[0], "") + why
            for name, why in self.trunk_config.unread().items()
        }
        if self.mtp_lambda_final is None:
            found["mtp_lambda_switch"] = "mtp_lambda_final=null"
        elif self.mtp_lambda_switch == 1:
            found["mtp_lambda_final"] = "mtp_lambda_switch=1"
        elif self.mtp_lambda_switch == 0:
            found["mtp_lambda"] = "mtp_lambda_switch=0"
        if not self.n_mtp_modules:
            idle = [name for name in type(self).model_fields if name.startswith("mtp_")]
            found |= dict.fromkeys([*idle, "concat_order"], "n_mtp_modules=0")
        return found


class MTPModule(nn.Module):
    """One depth of prediction. Parameters are called as in released checkpoints."""

    def __init__(self, cfg: MTMConfig, trunk: Decoder, layer: int) -> None:
        super().__init__()
        self.embed_first = cfg.concat_order == "embed_first"
        self.hnorm, self.enorm = trunk.new_norm(), trunk.new_norm()
        self.eh_proj = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=False)
        self.block = trunk.new_block(layer)
        self.norm = None if cfg.mtp_share_head_norm else trunk.new_norm()

    def forward(
        self, hidden: Tensor, embedded: Tensor, shared: tuple[Any, ...], cache: Cache | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden (B, T, D) of the depth before, embedded (B, T, D): the next real token of each position -> the state
        that the next depth reads, (B, T, D), and what its block told."""
        pair = self.hnorm(hidden), self.enorm(embedded)
        x = self.eh_proj(torch.cat(pair[::-1] if self.embed_first else pair, dim=-1))
        return through([self.block], x, shared, cache)


class MTM(Decoder):
    Config = MTMConfig
    cfg: MTMConfig

    def __init__(self, cfg: MTMConfig) -> None:
        super().__init__(cfg)
        self.trunk: Any = cfg.trunk_class(cfg.trunk_config)
        self.mtp_modules = nn.ModuleList(
            MTPModule(cfg, self.trunk, cfg.n_layers + depth) for depth in range(cfg.n_mtp_modules)
        )

    @property
    def depths(self) -> list[Any]:
        """The modules in their order."""
        return list(self.mtp_modules)

    def forward(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        ahead: Sequence[Tensor] = (),
        **drawn: Any,
    ) -> Tensor | Hidden:
        """As `Decoder.forward`, of the trunk. `ahead`: the first, second, ... token after each position, (B, T) each:
        for each of them a module runs behind the trunk, and its states (B, T, D), ready for the output matrix, are
        `Hidden.extra`'s `further(k)`."""
        assert cache is None or not ahead, "modules keep caches of their own: ModuleDrafter"
        states, hidden, shared, told = self.run_trunk(tokens, doc_ids, cache, cu_seqlens, **drawn)
        extra = {}
        for k, (module, known) in enumerate(zip(self.mtp_modules, ahead, strict=False), 2):
            hidden, more = module(hidden, self.embedded(known), shared)
            extra[further(k)] = self.head_states(module, hidden)
            told |= {name: torch.cat((told[name], t)) if name in told else t for name, t in more.items()}
        return Hidden(states, told | extra) if told or extra else states

    def run_trunk(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        **drawn: Any,
    ) -> tuple[Tensor, Tensor, tuple[Any, ...], dict[str, Tensor]]:
        """As `Decoder.forward`: states behind the last norm, what the first module reads, (B, T, D) each, what all
        blocks share, and what those of the trunk told."""
        x, shared, told = self.run_stack(tokens, doc_ids, cache, cu_seqlens, **drawn)
        states = self.stack[1](x)
        return states, states if self.cfg.mtp_hidden == "post_norm" else x, shared, told

    def embedded(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D): without positions, which attention and the trunk's state know."""
        return F.dropout(F.embedding(tokens, self.embedding_weight), self.cfg.dropout, self.training)

    def head_states(self, module: Any, hidden: Tensor) -> Tensor:
        """What the output matrix multiplies, (B, T, D), of a module's state (B, T, D)."""
        norm = self.stack[1] if module.norm is None else module.norm
        return norm(hidden)

    # -- the trunk's ------------------------------------------------------------------------------------------

    @property
    def lm_head(self) -> nn.Linear | None:  # type: ignore[override]
        return self.trunk.lm_head

    @property
    def logit_softcap(self) -> Any:  # type: ignore[override]
        return self.trunk.logit_softcap

    @property
    def embedding_weight(self) -> Tensor:
        return self.trunk.embedding_weight

    @property
    def max_context(self) -> int | None:
        return self.trunk.max_context

    @property
    def stack(self) -> tuple[nn.ModuleList, nn.Module]:
        return self.trunk.stack

    def embed(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None = None,
        **drawn: Any,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        return self.trunk.embed(tokens, doc_ids, cache, cu_seqlens, **drawn)

    def init_cache(self, rows: int) -> KVCache:
        return self.trunk.init_cache(rows)

    @property
    def max_drafts(self) -> int:
        return self.cfg.n_mtp_modules

    def init_drafter(self, rows: int, drafts: int) -> ModuleDrafter:
        return ModuleDrafter(self, rows, drafts)

    # -- parameters -------------------------------------------------------------------------------------------

    def init_weights(self, generator: torch.Generator) -> None:
        """The trunk's as its own; modules as its blocks, M_k N(0, 0.02^2)."""
        self.trunk.init_weights(generator)
        for module in self.mtp_modules:
            self.trunk.init_part(module, generator)

    def blocks(self) -> list[str]:
        modules = (f"mtp_modules.{depth}.block" for depth in range(self.cfg.n_mtp_modules))
        return [*(f"trunk.{path}" for path in self.trunk.blocks()), *modules]

    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    def param_roles(self) -> list[Rule]:
        """Of the trunk, and of blocks like its own wherever they are."""
        of_trunk = self.trunk.param_roles()
        return [
            Rule(r"mtp_modules\.\d+\.eh_proj\.weight", "matrix"),
            Rule(r"mtp_modules\.\d+\.(hnorm|enorm|norm)\.weight", "scalar"),
            *(replace(rule, pattern=rf"trunk\.({rule.pattern})") for rule in of_trunk),
            *of_trunk,
        ]

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """Copies of the weights as DeepSeek-V3's checkpoints name them (`models/layers/nextn.py`)."""
        return to_nextn(self)

    def from_hf_state_dict(self, hf: Mapping[str, Tensor]) -> None:
        """Load such weights. ValueError, and nothing is loaded, where they do not fit."""
        from_nextn(self, hf)

    def active_parameters(self) -> int | None:
        """Where not all parameters act on a token."""
        return active_parameters(self) if hasattr(self.trunk, "active_parameters") else None

    def flops(self, seq_len: int) -> Flops:
        """Modules and their products with the output matrix take part in training only."""
        matrices = matmul_flops(2 * self.cfg.d_model**2 + self.head_weight.numel())
        modules = (self.trunk.block_flops(seq_len) + matrices) * self.cfg.n_mtp_modules
        return self.trunk.flops(seq_len) + modules.training_only
