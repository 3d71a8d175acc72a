"""The backbone of the diffusion models: a bidirectional transformer that knows how noisy its input is.

Peebles and Xie 2022 (DiT, arXiv:2212.09748) with rotary positions (Su et al. 2021), as used for text by SEDD
(louaaron/Score-Entropy-Discrete-Diffusion, `model/transformer.py`) and MDLM (kuleshov-group/mdlm,
`models/dit.py`).

Shapes: B rows, L positions, D width, H heads, h = D/H head width, c conditioning width, n real tokens,
V states of a position: n, or n + 1 with the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from configs.match import SizeDials, decoder_dials, ratio_dial
from configs.schema import DefaultModelConfig, Dropout, Free, Positive, Rate
from kernels.attention import Plan, Visible, attention, attention_call, plan_attention, training_facts
from kernels.choose import UsesKernels
from kernels.precision import compute_dtype
from kernels.qk_norm_rope import qk_norm_rope, rotation_call
from models.layers.adaln import AdaLN, AdaptiveNorm, TimeEmbedding, gated_residual
from models.layers.cache import KVCache
from models.layers.flops import Flops
from models.layers.init import INIT_STD, normal_
from models.layers.roles import Rule
from models.layers.rotary import rotary_tables

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["DiT", "DiTConfig", "Draws", "fill_in"]

ROTARY_THETA = 10_000.0


Draws = Annotated[int, Field(ge=4, multiple_of=4)]


class DiTConfig(DefaultModelConfig):
    """Fields of every diffusion model. `vocab_size` is the tokenizer's, without an appended mask."""

    cond_dim: Positive = 128  # width of the time embedding
    d_mult: Positive | Rate = 4  # hidden width of the MLP, in units of d_model
    eps: Rate = 1e-5  # of every LayerNorm
    dropout: Free[Dropout] = 0.1  # of what attention and MLP add
    tie_word_embeddings: bool = False
    time_conditioning: bool = True  # False: the network always sees time 0
    absorbing_state_idx: Annotated[int, Field(ge=-1)] = -1  # -1 appends a mask id; or a reserved token's id
    ignore_bos: bool = True  # the first token of a row is given: not noised, not scored
    final_step: Free[Literal["sample", "argmax"]] = "sample"  # of the sampler
    nelbo_draws: Free[Draws] = 8  # noise draws per held-out row of the bound, in 4 independent replicates

    tiny = {"nelbo_draws": 4}

    @property
    def hidden_width(self) -> int:
        """Of the MLP."""
        return max(1, round(self.d_mult * self.d_model))

    def size_dials(self) -> SizeDials:
        return replace(decoder_dials(self), fine=(ratio_dial("d_mult", self.d_mult),))

    @property
    def has_mask(self) -> bool:
        """Whether the chain has a mask state."""
        return True

    @property
    def share_of_logits(self) -> float:
        """Share of positions whose logits a training step computes, on average: masked ones only, where the loss reads
        no others, and half of all when masking probabilities are uniform."""
        return 0.5 if self.has_mask else 1.0

    def problems(self, run: RunConfig) -> list[str]:
        problems = super().problems(run)
        if self.d_model % self.n_heads == 0 and self.d_model // self.n_heads % 2:
            problems.append(
                f"model_cfg.d_model ({self.d_model}) / model_cfg.n_heads ({self.n_heads}) must be even: "
                f"rotary positions turn pairs. Nearest: d_model={self.d_model + self.n_heads}"
            )
        index = self.absorbing_state_idx
        if index >= 0 and not self.has_mask:
            problems.append(
                f"model_cfg.absorbing_state_idx ({index}) names a mask, and this chain has none. Set it to -1"
            )
        if index >= 0 and self.vocab_size is not None and index >= self.vocab_size:
            problems.append(
                f"model_cfg.absorbing_state_idx ({index}) must be below model_cfg.vocab_size "
                f"({self.vocab_size}), or -1 to append a mask"
            )
        return problems


def fill_in(given: Any, by_chain: dict[str, dict[str, Any]]) -> Any:
    """Fields left out or null get the values of their `transition_type`."""
    if not isinstance(given, dict):
        return given
    values = by_chain.get(str(given.get("transition_type")), by_chain["absorbing"])
    return given | {k: v for k, v in values.items() if given.get(k) is None}


class Attention(UsesKernels):
    """Every position sees every other one, unless a mask says otherwise. No biases."""

    def __init__(self, cfg: DiTConfig, layer: int) -> None:
        super().__init__()
        self.n_heads, self.layer, self.head_width = cfg.n_heads, layer, cfg.d_model // cfg.n_heads
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model, bias=False)
        self.out = nn.Linear(cfg.d_model, cfg.d_model, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], plan: Plan, cache: KVCache | None) -> Tensor:
        """(B, L, D) -> (B, L, D), or fewer positions where `plan` has no queries for the first ones."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)  # (B, L, H, h)
        q, k = qk_norm_rope(q, k, *rotary, self.kernels)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, h)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = attention(q, k, v, plan)
        return self.out(y.transpose(1, 2).flatten(2))

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"qk_norm_rope": rotation_call(self.head_width, interleaved=False)}


class MLP(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(cfg.d_model, cfg.hidden_width)
        self.down = nn.Linear(cfg.hidden_width, cfg.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each behind a norm that the time modulates and before a gate that starts at zero."""

    def __init__(self, cfg: DiTConfig, layer: int) -> None:
        super().__init__()
        self.dropout = cfg.dropout
        self.adaln = AdaLN(cfg.cond_dim, cfg.d_model, parts=6)
        self.norm1 = AdaptiveNorm(cfg.d_model, cfg.eps)
        self.attn = Attention(cfg, layer)
        self.norm2 = AdaptiveNorm(cfg.d_model, cfg.eps)
        self.mlp = MLP(cfg)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rotary: tuple[Tensor, Tensor],
        plan: Plan,
        cache: KVCache | None = None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c)
        branch = self.attn(self.norm1(x, shift1, scale1), rotary, plan, cache)
        # Where the first positions were only looked at, nothing of them is needed any more.
        x, gate1, shift2, scale2, gate2 = (
            t[:, -branch.shape[1] :] for t in (x, gate1, shift2, scale2, gate2)
        )
        x = gated_residual(x, gate1, F.dropout(branch, self.dropout, self.training))
        branch = self.mlp(self.norm2(x, shift2, scale2))
        return gated_residual(x, gate2, F.dropout(branch, self.dropout, self.training))


class Output(nn.Module):
    """Parameters of the output layer; no weight of its own if it is the embedding's. The product itself
    happens inside the loss, a few rows at a time."""

    weight: nn.Parameter | None

    def __init__(self, states: int, width: int, tied: bool) -> None:
        super().__init__()
        self.register_parameter("weight", None if tied else nn.Parameter(torch.empty(states, width)))
        self.bias = nn.Parameter(torch.empty(states))


class DiT(UsesKernels):
    """Noisy tokens and their time in, hidden states of the output layer out.

    Attributes: `n` real tokens, `V` states, `mask_id` (None for a chain without a mask). Parameters have
    exactly V rows, so that their number is the published one; kernels pad their own copies.
    """

    Config: type[DiTConfig] = DiTConfig

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        if cfg.vocab_size is None:
            raise ValueError("vocab_size: must be filled in before the model is built")
        self.cfg = cfg
        self.n, self.V, self.mask_id = _states(cfg)
        self.embed = nn.Embedding(self.V, cfg.d_model)
        self.time = TimeEmbedding(cfg.cond_dim)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.final_adaln = AdaLN(cfg.cond_dim, cfg.d_model, parts=2)
        self.final_norm = AdaptiveNorm(cfg.d_model, cfg.eps)
        self.output = Output(self.V, cfg.d_model, cfg.tie_word_embeddings)

    def forward(
        self,
        tokens: Tensor,
        tau: Tensor,
        doc_ids: Tensor | None = None,
        attention: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, L) int64 -> hidden (B, L, D), the input of the output layer.

        tau (B,) or (B, L): time or noise level of each row or position. doc_ids (B, L): attention stays
        within equal ids (rotary positions are relative and need no restart). cu_seqlens (N + 1,): the same as
        offsets (data/offsets.py), which faster attention asks for. attention: a further restriction, bool,
        broadcastable to (B, 1, L, L), True where a query (row) may look.
        """
        rows, length = tokens.shape
        if attention is not None:
            attention = attention.expand(torch.broadcast_shapes(attention.shape, (1, 1, length, length)))
        offsets = None if doc_ids is None else cu_seqlens
        visible = Visible(rows, length, length, tokens.device, False, None, doc_ids, offsets, mask=attention)
        positions = torch.arange(length, device=tokens.device)
        return self.trunk(tokens, self.condition(tau), positions, [self.plan(visible)] * self.cfg.n_layers)

    def plan(self, visible: Visible) -> Plan:
        """How layers attend to what is visible."""
        return plan_attention(visible, dtype=self.compute_dtype, kernels=self.kernels, **self._heads)

    @property
    def _heads(self) -> dict[str, Any]:
        return {"heads": (self.cfg.n_heads, self.cfg.n_heads), "width": self.cfg.d_model // self.cfg.n_heads}

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        # A row has one position more than it has tokens to predict.
        return {"attention": attention_call(training_facts(seq_len + 1, causal=False), **self._heads)}

    @property
    def compute_dtype(self) -> torch.dtype:
        """Number format of matrix products."""
        return compute_dtype(self.embed.weight)

    def trunk(
        self,
        tokens: Tensor,
        c: Tensor,
        positions: Tensor,
        plans: Sequence[Plan],
        cache: KVCache | None = None,
    ) -> Tensor:
        """tokens (B, L), c (B or 1, L or 1, c), positions (L,), a plan for each layer -> hidden (B, L, D)."""
        x = self.embed(tokens)  # (B, L, D)
        head_width = self.cfg.d_model // self.cfg.n_heads
        rotary = rotary_tables(positions, head_width, ROTARY_THETA, x.dtype)
        for block, plan in zip(self.layers, plans, strict=True):
            x = block(x, c, rotary, plan, cache)
        return self.final_norm(x, *self.final_adaln(c[:, -x.shape[1] :]))

    def condition(self, tau: Tensor) -> Tensor:
        """(B,) -> (B, 1, c), (B, L) -> (B, L, c); (1, 1, c), the same for all, without time conditioning."""
        if not self.cfg.time_conditioning:
            tau = tau.new_zeros(1)
        c = self.time(tau)
        return c if tau.ndim == 2 else c[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype), self.head_bias.to(hidden.dtype))

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        return self.embed.weight if self.output.weight is None else self.output.weight

    @property
    def head_bias(self) -> Tensor:
        """(V,)."""
        return self.output.bias

    @property
    def max_context(self) -> int:
        return self.cfg.n_ctx

    def init_weights(self, generator: torch.Generator) -> None:
        """Linears as PyTorch's default, U(+-1/sqrt(fan_in)), the embedding U(+-1/sqrt(D)); modulation and
        output zero, so that blocks start as identities and predictions as uniform. A tied matrix cannot be
        zero: N(0, 0.02^2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                _uniform_(module.weight, bound, generator)
                if module.bias is not None:
                    _uniform_(module.bias, bound, generator)
            elif isinstance(module, AdaLN | AdaptiveNorm):
                module.init_weights()
        if self.output.weight is None:
            normal_(self.embed.weight, INIT_STD, generator)
        else:
            _uniform_(self.embed.weight, self.cfg.d_model**-0.5, generator)
            nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def blocks(self) -> list[str]:
        return [f"layers.{layer}" for layer in range(self.cfg.n_layers)]

    lora_targets = ("attn.qkv", "attn.out")

    def param_roles(self) -> list[Rule]:
        return [
            Rule(r"embed\.weight", "embedding"),
            Rule(r"output\.weight", "head"),
            Rule(r"layers\.\d+\.attn\.qkv\.weight", "matrix", split=3),
            Rule(r"layers\.\d+\.(attn\.out|mlp\.up|mlp\.down)\.weight", "matrix"),
            # Modulation sets scales and gates; it and the time MLP are no maps between hidden states.
            Rule(r"(layers\.\d+\.|final_)adaln\.weight|time\.(inner|outer)\.weight", "scalar"),
            Rule(r".*norm\d?\.weight|.*\.bias", "scalar"),
        ]

    def flops(self, seq_len: int) -> Flops:
        """Per token: `n_layers (24 D^2 + 4 L D) + 2 D V` forward at d_mult = 4, every position attending to
        all L, and the conditioning, which each row pays once (without time conditioning: a whole batch, so nothing).
        Training is three times that, with the head only where the loss reads it (`Config.share_of_logits`)."""
        keys = self.cfg.n_layers * seq_len
        conditioning = self._conditioning() / seq_len if self.cfg.time_conditioning else 0.0
        return self._flops(self._products() + conditioning, keys, keys)

    def _flops(self, trunk: float, keys: float, reference_keys: float) -> Flops:
        """`trunk`: operations per token of all but attention's pairs and the head."""
        per_key, head = 4 * self.cfg.d_model, 2 * self.head_weight.numel()
        weights = (trunk + self.cfg.share_of_logits * head) / 2
        trunk += keys * per_key
        training = 3 * (trunk + self.cfg.share_of_logits * head)
        masked = (reference_keys - keys) * per_key
        return Flops(trunk + head, training, keys, reference_keys, masked, 3 * masked, weights)

    def _products(self) -> float:
        """Operations of the blocks' matrices, per token."""
        width, hidden = self.cfg.d_model, self.cfg.hidden_width
        return self.cfg.n_layers * (8 * width**2 + 4 * width * hidden)

    def _conditioning(self) -> float:
        """Operations of the time MLP and all modulations, per value of tau."""
        modules = [m for m in self.modules() if isinstance(m, AdaLN)] + [self.time.inner, self.time.outer]
        return 2 * sum(m.weight.numel() for m in modules)


def _states(cfg: DiTConfig) -> tuple[int, int, int | None]:
    """(n, V, mask_id): a mask is appended behind the vocabulary, or is a token reserved inside it."""
    if cfg.vocab_size is None:
        raise ValueError("vocab_size: must be filled in before the model is built")
    if not cfg.has_mask:
        return cfg.vocab_size, cfg.vocab_size, None
    if cfg.absorbing_state_idx == -1:
        return cfg.vocab_size, cfg.vocab_size + 1, cfg.vocab_size
    if cfg.absorbing_state_idx >= cfg.vocab_size:
        raise ValueError(
            f"model_cfg.absorbing_state_idx ({cfg.absorbing_state_idx}) must be below the vocabulary's size "
            f"({cfg.vocab_size}). Set it to -1 to append a mask id"
        )
    return cfg.vocab_size - 1, cfg.vocab_size, cfg.absorbing_state_idx


@torch.no_grad()
def _uniform_(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """U(-bound, bound), drawn on the generator's device and in fp32 or better (see `layers.init.normal_`)."""
    if tensor.is_meta:
        return
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    draw = torch.empty(tensor.shape, dtype=dtype, device=generator.device)
    tensor.copy_(draw.uniform_(-bound, bound, generator=generator))
