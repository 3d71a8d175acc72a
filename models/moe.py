"""Mixture of experts: the control's decoder, whose feed-forward layers are E experts of which a token uses k.

Two gates: `mixtral` (softmax, a loss that balances; Jiang et al. 2024, arXiv:2401.04088) and `deepseek_v3` (sigmoids,
many small experts and a shared one, a bias that balances without a gradient; DeepSeek-AI 2024, 2412.19437; Dai et al.
2024, 2401.06066). At the defaults k experts and the shared ones are together as wide as the control's feed-forward
layer.

Shapes: B rows, T tokens, D width, E experts, k per token, f hidden width of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from configs.match import SizeDials, multiples, width_dial
from configs.schema import Fraction, Free, NonNegative, NonNegativeFloat, OpenFraction, Positive, Rate
from models.huggingface import ROWS, Row, model_type_of
from models.layers.cache import KVCache
from models.layers.experts import (
    CORRECTION_BIAS,
    BiasedGate,
    ExpertLayer,
    Experts,
    Gate,
    SoftmaxGate,
    active_parameters,
)
from models.layers.flops import Flops, matmul_flops
from models.layers.huggingface_experts import Single, single
from models.layers.init import residual_std
from models.layers.roles import Rule
from models.vanilla import MLP, Block, PlainBlock, Rotation, Vanilla, VanillaConfig, block_flops

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from kernels.attention import Plan

__all__ = ["MoE", "MoEConfig"]

PER_EXPERT = 8  # hidden widths are multiples of it: rows of 16 bytes

# YAML has lists; frozen configurations hold tuples.
_AsTuple = BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
PerLayer = Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1), _AsTuple]

# What a field that is left open is, by gate.
_BY_GATE: dict[str, dict[str, Any]] = {
    "mixtral": {
        "num_experts": 8,
        "top_k": 2,
        "n_shared_experts": 0,
        "first_k_dense": 0,
        "alpha": 0.01,
        "beta": 0.001,
        "gate_norm_factor": 1.0,
    },
    "deepseek_v3": {
        "num_experts": 32,
        "top_k": 7,
        "n_shared_experts": 1,
        "first_k_dense": 1,
        "alpha": 0.0,
        "beta": 0.0,
        "gate_norm_factor": 1.0,
    },
}
# What only a gate with a bias reads.
_OF_BIASED = (
    *("gate_norm_factor", "bias_update_speed", "bias_freeze_frac", "seq_aux_alpha"),
    *("n_group", "topk_group"),
)
_BIASED = {"gate_type": "deepseek_v3", "first_k_dense": 0, "num_experts": 8, "top_k": 2}


class MoEConfig(VanillaConfig):
    gate_type: Literal["mixtral", "deepseek_v3"] = "mixtral"
    num_experts: Positive | None = None  # None here and below: see _BY_GATE
    top_k: Positive | None = None
    d_ff_expert: Positive | None = None  # None = the control's width / (top_k + n_shared_experts)
    n_shared_experts: NonNegative | None = None  # run for every token, as one network of their joint width
    first_k_dense: NonNegative | None = None  # layers before the first that may have experts
    moe_every: Positive = 1  # of the layers behind those, every so many have experts
    alpha: Free[NonNegativeFloat | None] = None  # weight of the balance, of each layer that has experts
    alphas: Free[PerLayer | None] = None  # one for each of them
    beta: Free[NonNegativeFloat | None] = None  # weight of the router's z-loss
    betas: Free[PerLayer | None] = None
    aux_reduction: Free[Literal["mean", "sum"]] = "mean"  # over the layers
    balance_over: Free[Literal["row", "micro_batch"]] = "row"
    jitter_noise: Free[OpenFraction] = 0.0
    gate_norm_factor: Rate | None = None
    bias_update_speed: Free[NonNegativeFloat] = 0.001
    bias_freeze_frac: Free[Fraction] = 0.03
    seq_aux_alpha: Free[NonNegativeFloat] = 1e-4
    n_group: Positive = 1
    topk_group: Positive = 1

    tiny = {"num_experts": 4}
    examples = {
        "gate_type": ("deepseek_v3", {"top_k": 2}),
        "first_k_dense": 1,
        "alphas": ((0.5, 0.1), {"alpha": None}),
        "betas": ((0.5, 0.1), {"beta": None}),
        "gate_norm_factor": (2.5, _BIASED),
        "bias_update_speed": (0.5, _BIASED),
        "bias_freeze_frac": (1.0, {**_BIASED, "bias_update_speed": 0.5}),
        "seq_aux_alpha": (0.1, _BIASED),
        "n_group": (4, _BIASED),
        "topk_group": (2, {**_BIASED, "n_group": 4}),
    }

    def or_default(self, name: str) -> Any:
        """The field, or what it is with this gate where it is left open."""
        given = getattr(self, name)
        return _BY_GATE[self.gate_type][name] if given is None else given

    @property
    def experts(self) -> int:
        return self.or_default("num_experts")

    @property
    def chosen(self) -> int:
        return self.or_default("top_k")

    @property
    def shared(self) -> int:
        return self.or_default("n_shared_experts")

    @property
    def dense_layers(self) -> int:
        return self.or_default("first_k_dense")

    @property
    def factor(self) -> float:
        return self.or_default("gate_norm_factor")

    @property
    def expert_width(self) -> int:
        """f: so that what a token uses is as wide as the control's layer, rounded up to a multiple of 8."""
        if self.d_ff_expert is not None:
            return self.d_ff_expert
        return PER_EXPERT * -(-self.hidden_width // (PER_EXPERT * (self.chosen + self.shared)))

    def size_dials(self) -> SizeDials:
        """Their width, and how many there are, which the tokens do not see."""
        fine = (
            multiples("d_ff_expert", self.expert_width, PER_EXPERT),
            multiples("num_experts", self.experts, 1),
        )
        width = width_dial(
            *(self.d_model, self.n_heads, self.n_kv_heads),
            ffn_hidden=self.ffn_hidden,
            d_ff_expert=self.d_ff_expert,
        )
        return replace(super().size_dials(), width=width, fine=fine)

    def has_experts(self, layer: int) -> bool:
        """Layers beyond the stack's, such as those of another model that is built of these, do."""
        dense = self.dense_layers
        return layer >= self.n_layers or (layer >= dense and (layer - dense) % self.moe_every == 0)

    @property
    def expert_layers(self) -> list[int]:
        return [layer for layer in range(self.n_layers) if self.has_experts(layer)]

    def weights(self, name: str, number: int) -> list[float]:
        """What a loss of each of `number` layers with experts is multiplied by in the sum over them; layers beyond
        those that a list names weigh as its last."""
        listed = getattr(self, f"{name}s", None) or (self.or_default(name),)
        weights = [listed[min(layer, len(listed) - 1)] for layer in range(number)]
        return [weight / number for weight in weights] if self.aux_reduction == "mean" else weights

    def problems(self, run: RunConfig) -> list[str]:
        found = super().problems(run)
        if self.chosen > self.experts:
            found.append(
                f"model_cfg.top_k ({self.chosen}) must not exceed model_cfg.num_experts ({self.experts}); nearest: "
                f"top_k={self.experts}, or num_experts={self.chosen}"
            )
        dense = self.dense_layers
        if dense >= self.n_layers:
            found.append(
                f"model_cfg.first_k_dense ({dense}) leaves none of model_cfg.n_layers ({self.n_layers}) with experts; "
                f"nearest: first_k_dense={self.n_layers - 1}, or type=vanilla"
            )
        for name in ("alpha", "beta"):
            found += self._weight_problems(name)
        return found + (self._group_problems() if self.gate_type == "deepseek_v3" else [])

    def _weight_problems(self, name: str) -> list[str]:
        one, listed, layers = getattr(self, name), getattr(self, f"{name}s"), self.expert_layers
        if listed is None:
            return []
        if one is not None:
            return [
                f"model_cfg.{name} ({one:g}) and model_cfg.{name}s ({list(listed)}) are both given; set one of them to "
                f"null (0 is a weight of zero)"
            ]
        if layers and len(listed) != len(layers):
            return [
                f"model_cfg.{name}s has {len(listed)} values, and {len(layers)} layers have experts "
                f"({', '.join(map(str, layers))}, counted from 0): give {len(layers)}, or model_cfg.{name} for all"
            ]
        return []

    def _group_problems(self) -> list[str]:
        experts, groups, kept = self.experts, self.n_group, self.topk_group
        if groups == 1 and kept == 1:
            return []
        # A group is scored by its two best.
        legal = [n for n in range(1, experts + 1) if experts % n == 0 and (n == 1 or experts // n >= 2)]
        if groups not in legal:
            # 1 is legal, so that there is one below; above there may be none.
            near = [max(n for n in legal if n < groups), *[n for n in legal if n > groups][:1]]
            return [
                f"model_cfg.n_group ({groups}) must divide model_cfg.num_experts ({experts}) into groups of at "
                f"least 2; nearest: {', '.join(map(str, near))}"
            ]
        size = experts // groups
        enough = -(-self.chosen // size)
        if not enough <= kept <= groups:
            return [
                f"model_cfg.topk_group ({kept}) must be from {enough} to {groups}: model_cfg.top_k ({self.chosen}) "
                f"experts are chosen from so many of model_cfg.n_group ({groups}) groups of {size}; nearest: "
                f"{min(max(kept, enough), groups)}"
            ]
        return []

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if self.gate_type == "mixtral":
            found |= dict.fromkeys(_OF_BIASED, "gate_type=mixtral")
        elif self.bias_update_speed == 0:
            found["bias_freeze_frac"] = "bias_update_speed=0"
        if self.n_group == 1:
            found.setdefault("topk_group", "n_group=1")
        if self.d_ff_expert is not None and len(self.expert_layers) == self.n_layers:  # no layer is dense
            found |= dict.fromkeys(("ffn_hidden", "multiple_of"), f"d_ff_expert={self.d_ff_expert}")
        return found

    def new_gate(self, layer: int) -> Gate:
        common = (self.d_model, self.experts, self.chosen, self.jitter_noise, layer)
        if self.gate_type == "mixtral":
            return SoftmaxGate(*common)
        return BiasedGate(*common, factor=self.factor, groups=self.n_group, kept_groups=self.topk_group)

    def dense(self, width: int, **changes: Any) -> VanillaConfig:
        """For parts of the control with a feed-forward layer of `width`."""
        return self.model_copy(update={"ffn_hidden": width, **changes})


def expert_layer(cfg: MoEConfig, layer: int) -> ExpertLayer:
    shared = cfg.shared * cfg.expert_width  # side by side they are one network
    return ExpertLayer(
        cfg.new_gate(layer),
        Experts(cfg.d_model, cfg.experts, cfg.expert_width, cfg.use_swiglu),
        MLP(cfg.dense(shared, bias=False, dropout=0.0)) if shared else None,
        dropout=cfg.dropout,
        balance_over_batch=cfg.balance_over == "micro_batch",
    )


class ExpertBlock(Block):
    def __init__(self, cfg: MoEConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        self.mlp: nn.Module = expert_layer(cfg, layer)  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        plan: Plan,
        rotation: Rotation | None,
        row_seeds: Tensor | None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x, and what is told of its experts (`ExpertLayer.statistics`)."""
        branch = self.self_attn(self.input_layernorm(x), plan, rotation, cache)
        x, y = self.post_attention_layernorm(x, branch)
        y, told = self.mlp(y, row_seeds)
        return x + y, told


class MoE(Vanilla):
    """`forward` takes `row_seeds` (B,) int64, of which the jitter of the gates is a function; without them there is
    none."""

    Config = MoEConfig
    cfg: MoEConfig

    def shared(
        self,
        tokens: Tensor,
        past: int,
        doc_ids: Tensor | None,
        cu_seqlens: Tensor | None = None,
        row_seeds: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The plan of attention, the rotation, and the seeds."""
        return (*super().shared(tokens, past, doc_ids, cu_seqlens), row_seeds)

    def new_block(self, layer: int) -> nn.Module:
        return (ExpertBlock if self.cfg.has_experts(layer) else PlainBlock)(self.cfg, layer)

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """Experts as the control's feed-forward layer, gates N(0, 0.02^2), biases 0."""
        super().init_part(part, generator)
        for module in part.modules():
            if isinstance(module, Gate):
                module.init_weights(generator)
            elif isinstance(module, Experts):
                module.init_weights(generator, residual_std(self.cfg.n_layers))

    def param_roles(self) -> list[Rule]:
        return [
            Rule(r".*\.mlp\.gate\.weight", "router", wd_mult=0.0),
            Rule(r".*\.mlp\.experts\.(gate|up|down)_proj", "matrix"),
            Rule(r".*\.mlp\.shared_experts\.(gate|up|down)_proj\.weight", "matrix"),
            *super().param_roles(),
        ]

    def block_flops(self, seq_len: int) -> Flops:
        """Of one block with experts, per token: of those that it uses, and of the gate."""
        c = self.cfg
        used = c.dense((c.chosen + c.shared) * c.expert_width)
        return block_flops(used, seq_len) + matmul_flops(c.experts * c.d_model)

    def flops(self, seq_len: int) -> Flops:
        c, with_experts = self.cfg, len(self.cfg.expert_layers)
        dense = block_flops(c, seq_len) * (c.n_layers - with_experts)
        return self.block_flops(seq_len) * with_experts + dense + matmul_flops(self.head_weight.numel())

    def active_parameters(self) -> int:
        return active_parameters(self)

    # -- the files of Hugging Face transformers (`MixtralForCausalLM`, `Glm4MoeForCausalLM`) --------------------

    hf_exact = (CORRECTION_BIAS,)

    @property
    def hf(self) -> Row:  # type: ignore[override]
        return ROWS[model_type_of("moe", self.cfg)]

    def hf_views(self) -> dict[str, Tensor]:
        """As in the base class, experts one by one, and the biases of gates."""
        views = super().hf_views()
        views |= {
            self.hf_prefix + name: buffer
            for name, buffer in self.named_buffers()
            if name.endswith(CORRECTION_BIAS)
        }
        found: dict[str, Tensor] = {}
        for name, view in views.items():
            found |= single(name, view, self.hf.experts)
        return found

    def hf_single(self, hf: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return Single(hf, self.hf.experts)
