"""nGPT: a transformer whose vectors all have length 1 (Loshchilov, Hsieh, Sun and Ginsburg 2024, arXiv:2410.01131).

Embeddings, hidden states, and what matrices are made of along the model's width lie on the unit sphere: a product is a
cosine. Each half of a block moves the state a learned part of the way towards its own output, along the sphere. There
are no norms with gains, no weight decay and no warm-up; what is lost in freedom comes back as learned scales of queries
and keys, of the hidden layer, and of logits.

Shapes: B rows, T tokens, D width, H heads, h = D/H head width, f hidden width, V_p padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import DefaultModelConfig, Free, Positive, Rate, RunConfig
from kernels.attention import Plan, Visible, attention, attention_call, plan_attention, training_facts
from kernels.choose import UsesKernels
from kernels.ngpt_update import ngpt_update
from kernels.precision import at_least_fp32, compute_dtype
from kernels.qk_norm_rope import qk_norm_rope, rotation_call
from kernels.unit_norm import unit_norm
from models.layers.cache import Cache, KVCache
from models.layers.decoder import Decoder, padded_vocabulary
from models.layers.flops import Flops, matmul_flops
from models.layers.init import normal_
from models.layers.roles import Rule
from models.layers.rotary import rotary_tables
from models.vanilla import VanillaConfig, block_flops

__all__ = ["NGPT", "Block", "NGPTConfig", "Scale"]

SHORTEST = 1e-12  # length of what has no direction, as in kernels/unit_norm
OUTWARDS = ("o_proj", "down_proj")  # matrices whose columns, not rows, lie along the model's width

Rotation = tuple[
    Tensor, Tensor, Tensor
]  # cosines, sines, and the gains (h,) that make a norm one to length 1


class NGPTConfig(DefaultModelConfig):
    ffn_hidden: Positive | None = None  # None = as in vanilla; the paper's is 4 d_model
    rope_theta: Rate = 10000.0
    tie_embeddings: bool = False
    # Learned scales: the value used is stored * init / scale, and what is stored begins at scale (section 2.5). None =
    # d_model^-1/2, the size of a unit vector's entries.
    alpha_init: Rate = 0.05  # part of the way that a half block moves the state at first, in every dim
    alpha_scale: Rate | None = None
    sqk_init: Rate = 1.0  # of queries and keys
    sqk_scale: Rate | None = None
    suv_init: Rate = 1.0  # of both halves of the hidden layer
    suv_scale: Rate = 1.0
    sz_init: Rate = 1.0  # of logits
    sz_scale: Rate | None = None
    normalize_every: Free[Positive] = 1  # steps between two normalisations of the weights

    # At first a state is its own token's embedding, almost, and all tokens are equally likely: where the context ends
    # shows in text where these two are otherwise.
    examples = {"n_ctx": (8, {"alpha_init": 1.0, "sz_init": 30.0})}

    @property
    def control(self) -> VanillaConfig:
        """The control of these sizes: its rules on them, hidden width and operations are this architecture's too."""
        sizes = {name: getattr(self, name) for name in DefaultModelConfig.model_fields}
        return VanillaConfig(**sizes, ffn_hidden=self.ffn_hidden)

    @property
    def hidden_width(self) -> int:
        return self.control.hidden_width

    def stored_at(self, scale: Rate | None) -> float:
        """What a scale of this setting is stored at."""
        return self.d_model**-0.5 if scale is None else scale

    def problems(self, run: RunConfig) -> list[str]:
        found = self.control.problems(run)
        found += [
            f"{name} ({decay:g}) shrinks nothing here: weights have length 1 after every step. Nearest: {name}=0"
            for name in ("weight_decay", "muon_weight_decay")
            if (decay := getattr(run, name))
        ]
        return found


class Scale(nn.Module):
    """A learned vector (width,), stored in other units than it is used in: these decide how fast Adam moves it
    (section 2.5)."""

    def __init__(self, width: int, init: float, stored: float) -> None:
        super().__init__()
        self.stored, self.factor = stored, init / stored
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self) -> Tensor:
        return self.weight * self.factor

    def init_weights(self) -> None:
        nn.init.constant_(self.weight, self.stored)


class Attention(UsesKernels):
    """Equations 15 and 16: queries and keys are rotated, then given length 1 per head, then scaled; values are left as
    they are. The paper's rotation turns dims 2i and 2i + 1 (Su et al. 2021)."""

    def __init__(self, cfg: NGPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_width = layer, cfg.control.head_width
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(cfg.d_model, cfg.d_model, bias=False) for _ in range(4)
        )
        self.qk_scale = Scale(cfg.d_model, cfg.sqk_init, cfg.stored_at(cfg.sqk_scale))

    def forward(self, x: Tensor, plan: Plan, rotation: Rotation, cache: KVCache | None) -> Tensor:
        per_head = (-1, self.head_width)
        q, k, v = (proj(x).unflatten(-1, per_head) for proj in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin, unit = rotation
        # A rotation keeps lengths: one may normalise before it, as the operation does.
        eps = SHORTEST**2 / self.head_width
        q, k = qk_norm_rope(q, k, cos, sin, self.kernels, weights=(unit, unit), eps=eps, interleaved=True)
        scale = self.qk_scale().to(q.dtype).view(per_head)  # (H, h)
        q, k, v = ((t.transpose(1, 2)) for t in (q * scale, k * scale, v))  # (B, H, T, h)
        if cache is not None:  # keys are stored as they are compared
            k, v = cache.append(self.layer, k, v)
        return self.o_proj(attention(q, k, v, plan).transpose(1, 2).flatten(2))

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"qk_norm_rope": rotation_call(self.head_width, interleaved=True)}


class MLP(nn.Module):
    """Equations 20 and 21: down( s_u up(x) * silu(sqrt(D) s_v gate(x)) ); sqrt(D) makes of cosines what silu is made
    for. The paper has it before s_u too, where the norm behind this layer takes it out again."""

    def __init__(self, cfg: NGPTConfig) -> None:
        super().__init__()
        width, hidden = cfg.d_model, cfg.control.hidden_width
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.gate_scale, self.up_scale = (Scale(hidden, cfg.suv_init, cfg.suv_scale) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        # Rows of weights are scaled and not what they give: there are more tokens than rows.
        spread = x.shape[-1] ** 0.5 * self.gate_scale()  # (f,)
        gate = F.linear(x, self.gate_proj.weight * spread[:, None])  # (B, T, f)
        up = F.linear(x, self.up_proj.weight * self.up_scale()[:, None])
        return self.down_proj(F.silu(gate) * up)


class Block(UsesKernels):
    """Equations 10 and 11: twice, x <- norm(x + |alpha| (norm(branch) - x)). Nothing is normalised before a branch, as
    x has length 1. Where it moves on from, the state is normalised first, as in the paper's code: but for the table's
    rows, which are parameters, it is so already."""

    def __init__(self, cfg: NGPTConfig, layer: int) -> None:
        super().__init__()
        self.reads_table = layer == 0
        self.self_attn = Attention(cfg, layer)
        self.mlp = MLP(cfg)
        self.attn_alpha, self.mlp_alpha = (
            Scale(cfg.d_model, cfg.alpha_init, cfg.stored_at(cfg.alpha_scale)) for _ in range(2)
        )

    def forward(self, x: Tensor, plan: Plan, rotation: Rotation, cache: KVCache | None = None) -> Tensor:
        dtype = compute_dtype(x)  # one conversion for all products that read x
        branch = self.self_attn(x.to(dtype), plan, rotation, cache)
        x = unit_norm(x, self.kernels) if self.reads_table else x
        x = ngpt_update(x, branch, self.attn_alpha().abs(), self.kernels)
        return ngpt_update(x, self.mlp(x.to(dtype)), self.mlp_alpha().abs(), self.kernels)

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"ngpt_update": {"columns": len(self.attn_alpha.weight)}}


class NGPT(Decoder):
    Config = NGPTConfig
    cfg: NGPTConfig
    fixed_norm = True

    def __init__(self, cfg: NGPTConfig) -> None:
        super().__init__(cfg)
        rows = padded_vocabulary(self.vocab_size)
        self.embed_tokens = nn.Embedding(rows, cfg.d_model)
        self.layers = nn.ModuleList(self.new_block(layer) for layer in range(cfg.n_layers))
        self.norm = self.new_norm()
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, rows, bias=False)
        self.head_scale = Scale(rows, cfg.sz_init, cfg.stored_at(cfg.sz_scale))

    @property
    def stack(self) -> tuple[nn.ModuleList, nn.Module]:
        return self.layers, self.norm

    def embed(
        self, tokens: Tensor, doc_ids: Tensor | None, cache: Cache | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Plan, Rotation]]:
        past = self.check_input(tokens, doc_ids, cache, learned=False)
        return self.embed_tokens(tokens), self.shared(tokens, past, doc_ids, cu_seqlens)  # (B, T, D)

    def shared(
        self, tokens: Tensor, past: int, doc_ids: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Plan, Rotation]:
        """The plan of attention, and what turns and normalises queries and keys."""
        table, width = self.embedding_weight, self.cfg.control.head_width
        visible = Visible.causally(tokens, past, doc_ids=doc_ids, cu_seqlens=cu_seqlens)
        # Products of unit vectors have variance 1/h: times sqrt(h) it is 1 (section 2.3.2).
        plan = plan_attention(
            visible, dtype=compute_dtype(table), kernels=self.kernels, scale=width**0.5, **self._heads
        )
        index = torch.arange(past, past + tokens.shape[1], device=tokens.device)  # (T,)
        cos, sin = rotary_tables(index, width, self.cfg.rope_theta, table.dtype)
        return plan, (cos, sin, cos.new_full((width,), width**-0.5))

    @property
    def _heads(self) -> dict[str, Any]:
        return {"heads": (self.cfg.n_heads, self.cfg.n_heads), "width": self.cfg.control.head_width}

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {
            "attention": attention_call(training_facts(seq_len), **self._heads),
            "unit_norm": {"columns": self.cfg.d_model},
        }

    @property
    def embedding_weight(self) -> Tensor:
        return self.embed_tokens.weight

    @property
    def logit_scale(self) -> Tensor:
        return self.head_scale()  # (V_p,)

    @property
    def constrain_every(self) -> int:
        return self.cfg.normalize_every

    def new_block(self, layer: int) -> nn.Module:
        return Block(self.cfg, layer)

    def new_norm(self) -> nn.Module:
        return nn.Identity()  # what leaves a block has length 1

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """N(0, 1/D), of which normalisation leaves the direction; so any factor on o_proj and down_proj would be lost.
        Scales begin at what they are stored at."""
        for module in part.modules():
            if isinstance(module, Scale):
                module.init_weights()
            elif isinstance(module, nn.Linear | nn.Embedding):
                normal_(module.weight, self.cfg.d_model**-0.5, generator)
        _normalise(part, torch.zeros(()))

    def constrain(self, skipped: Tensor) -> None:
        """Length 1 for rows of the embedding, of the head and of what reads the state, and for columns of what writes
        to it (section 2.6)."""
        _normalise(self, skipped)

    def blocks(self) -> list[str]:
        return [f"layers.{layer}" for layer in range(self.cfg.n_layers)]

    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    def param_roles(self) -> list[Rule]:
        """Adam moves every entry by about the rate. Entries of a unit vector are of size D^-1/2: for a step to turn it
        by one angle at every width, the rate goes as D^-1/2, for embedding and head as for matrices; and so for scales
        that are stored at that size. Muon's update of a matrix has rows (columns, of down_proj) of about its rate
        already."""
        c = self.cfg

        def scale(pattern: str, stored: float | None) -> Rule:
            return Rule(pattern, "scalar", width_power=0.5 if stored is None else None)

        return [
            Rule(r"embed_tokens\.weight", "embedding", width_power=0.5),
            Rule(r"lm_head\.weight", "head", width_power=0.5),
            Rule(r".*(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight", "matrix", width_power=0.5),
            scale(r".*(attn|mlp)_alpha\.weight", c.alpha_scale),
            scale(r".*qk_scale\.weight", c.sqk_scale),
            scale(r".*(gate|up)_scale\.weight", c.suv_scale),
            scale(r"head_scale\.weight", c.sz_scale),
        ]

    def block_flops(self, seq_len: int) -> Flops:
        return block_flops(self.cfg.control, seq_len)

    def flops(self, seq_len: int) -> Flops:
        return self.block_flops(seq_len) * self.cfg.n_layers + matmul_flops(self.embedding_weight.numel())


@torch.no_grad()
def _normalise(part: nn.Module, skipped: Tensor) -> None:
    """Give the vectors of all matrices of a module length 1, in at least fp32. The factor is 1 where `skipped`."""
    weights = [
        (module.weight, 0 if name.endswith(OUTWARDS) else 1)  # the dim that is the model's width
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    lengths = [
        torch.linalg.vector_norm(w, dim=dim, keepdim=True, dtype=at_least_fp32(w.dtype)) for w, dim in weights
    ]
    # All of them at once: on a GPU what counts here is launches.
    every = torch.cat([each.flatten() for each in lengths])
    factors = torch.where(skipped > 0, 1.0, 1 / every.clamp(min=SHORTEST)).split([n.numel() for n in lengths])
    shaped = [factor.view_as(n) for factor, n in zip(factors, lengths, strict=True)]
    torch._foreach_mul_([w for w, _ in weights], shaped)
