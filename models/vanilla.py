"""The control: a Llama-style decoder, exactly standard.

Pre-norm RMSNorm, rotary positions, SwiGLU, optional grouped-query attention, no biases, no embedding scale
(Touvron et al. 2023, arXiv:2302.13971; Su et al. 2021, 2104.09864; Shazeer 2020, 2002.05202; Zhang and
Sennrich 2019, 1910.07467; Ainslie et al. 2023, 2305.13245). Each modern part has a switch back to its
predecessor, so that a comparison changes one thing. Parameter names are those of Llama in `transformers`.

Shapes: B rows, T tokens, D width, H query heads, G key/value heads, h = D/H head width, f hidden width of
the feed-forward layer, V vocabulary, V_p padded vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import DefaultModelConfig, Dropout, Free, Positive, Rate, within_context
from kernels.attention import Plan, Visible, attention, attention_call, plan_attention, training_facts
from kernels.choose import UsesKernels
from kernels.precision import compute_dtype
from kernels.qk_norm_rope import qk_norm_rope, rotation_call
from models.huggingface import ROWS
from models.layers.cache import Cache, KVCache
from models.layers.decoder import padded_vocabulary, positions_of
from models.layers.flops import Flops, decoder_flops, matmul_flops, mean_keys
from models.layers.huggingface import HuggingFaceDecoder
from models.layers.init import INIT_STD, normal_, residual_std
from models.layers.norms import LayerNorm, RMSNorm
from models.layers.roles import Rule
from models.layers.rotary import rotary_tables

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["Block", "PlainBlock", "Vanilla", "VanillaConfig", "block_flops"]

Rotation = tuple[Tensor, Tensor]  # cosines and sines, see rotary_tables


class VanillaConfig(DefaultModelConfig):
    n_kv_heads: Positive | None = None  # None = n_heads
    ffn_hidden: Positive | None = None  # None = 8/3 d_model (GELU: 4 d_model), rounded up to multiple_of
    multiple_of: Positive = 64
    rope_theta: Rate = 10000.0
    norm_eps: Rate = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = False  # RMSNorm over the head width on queries and keys, before rotation
    attn_softcap: Rate | None = None  # c: scores become c tanh(score / c)
    sliding_window: Positive | None = None  # tokens that a token sees, itself included
    dropout: Free[Dropout] = 0.0  # of embeddings, attention probabilities and what blocks add
    bias: bool = False
    use_rope: bool = True  # False: learned positions, then n_ctx is a limit
    use_rmsnorm: bool = True  # False: LayerNorm
    use_swiglu: bool = True  # False: GELU

    examples = {"multiple_of": (128, {"ffn_hidden": None})}

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_heads

    @property
    def hidden_width(self) -> int:
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        thirds = 8 if self.use_swiglu else 12  # 8/3 D or 12/3 D, in integers: no rounding error before ceil
        return self.multiple_of * -(-thirds * self.d_model // (3 * self.multiple_of))

    def problems(self, run: RunConfig) -> list[str]:
        found = super().problems(run)
        if self.n_heads % self.kv_heads:
            legal = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            # 1 divides everything, so there is one below; above n_heads there is none.
            nearest = [max(n for n in legal if n < self.kv_heads)]
            nearest += [n for n in legal if n > self.kv_heads][:1]
            found.append(
                f"model_cfg.n_heads ({self.n_heads}) must be divisible by model_cfg.n_kv_heads "
                f"({self.kv_heads}); nearest n_kv_heads: {', '.join(map(str, nearest))}"
            )
        if self.use_rope and self.d_model % self.n_heads == 0 and self.head_width % 2:
            below, above = self.n_heads * (self.head_width - 1), self.n_heads * (self.head_width + 1)
            nearest_widths = ", ".join(str(width) for width in (below, above) if width > 0)
            found.append(
                f"model_cfg.d_model / model_cfg.n_heads ({self.d_model} / {self.n_heads} = {self.head_width})"
                f" must be even for rotary positions; nearest d_model: {nearest_widths}"
            )
        return found if self.use_rope else found + within_context(run, self.n_ctx)

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if self.ffn_hidden is not None:
            found["multiple_of"] = f"ffn_hidden={self.ffn_hidden}"
        if not self.use_rope:
            found["rope_theta"] = "use_rope=false"
        return found

    def norm(self, width: int) -> nn.Module:
        if self.use_rmsnorm:
            return RMSNorm(width, self.norm_eps)
        return LayerNorm(width, self.norm_eps, self.bias)


class Attention(UsesKernels):
    interleaved = False  # whether pairs of dims that turn are 2i and 2i + 1, not i and i + h/2

    def __init__(self, cfg: VanillaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, cfg.dropout
        self.head_width, self.eps, self.use_rope = cfg.head_width, cfg.norm_eps, cfg.use_rope
        kv_width = cfg.kv_heads * cfg.head_width
        self.q_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)
        self.k_proj = nn.Linear(cfg.d_model, kv_width, bias=cfg.bias)
        self.v_proj = nn.Linear(cfg.d_model, kv_width, bias=cfg.bias)
        self.o_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)
        self.q_norm = RMSNorm(cfg.head_width, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_width, cfg.norm_eps) if cfg.qk_norm else None

    def forward(self, x: Tensor, plan: Plan, rotation: Rotation | None, cache: KVCache | None) -> Tensor:
        per_head = (-1, self.head_width)
        q = self.q_proj(x).unflatten(-1, per_head)  # (B, T, H, h)
        k = self.k_proj(x).unflatten(-1, per_head)  # (B, T, G, h)
        v = self.v_proj(x).unflatten(-1, per_head)
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        if rotation is not None:
            gains = None if norms is None else (norms[0].weight, norms[1].weight)
            q, k = qk_norm_rope(
                q, k, *rotation, self.kernels, weights=gains, eps=self.eps, interleaved=self.interleaved
            )
        elif norms is not None:
            q, k = norms[0](q), norms[1](k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, h)
        if cache is not None:  # keys are stored rotated, each kv head once
            k, v = cache.append(self.layer, k, v)
        y = attention(q, k, v, plan)
        return F.dropout(self.o_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"qk_norm_rope": rotation_call(self.head_width, self.interleaved)} if self.use_rope else {}


class MLP(nn.Module):
    """SwiGLU: down( silu(gate x) * up x ); or GELU: down( gelu(up x) )."""

    def __init__(self, cfg: VanillaConfig) -> None:
        super().__init__()
        self.dropout = cfg.dropout
        hidden = cfg.hidden_width
        self.gate_proj = nn.Linear(cfg.d_model, hidden, bias=cfg.bias) if cfg.use_swiglu else None
        self.up_proj = nn.Linear(cfg.d_model, hidden, bias=cfg.bias)
        self.down_proj = nn.Linear(hidden, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)  # (B, T, f)
        y = F.gelu(up, approximate="tanh") if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        return F.dropout(self.down_proj(y), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, cfg: VanillaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = cfg.norm(cfg.d_model)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = cfg.norm(cfg.d_model)
        self.mlp = MLP(cfg)

    def forward(
        self,
        x: Tensor,
        plan: Plan,
        rotation: Rotation | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        branch = self.self_attn(self.input_layernorm(x), plan, rotation, cache)
        x, y = self.post_attention_layernorm(x, branch)
        return x + self.mlp(y)


class PlainBlock(Block):
    """Among blocks that are told more: called as these are, and heedless of it."""

    def forward(self, x: Tensor, plan: Plan, rotation: Rotation | None, *more: Any) -> Tensor:  # type: ignore[override]
        *_, cache = more
        return super().forward(x, plan, rotation, cache)


def block_flops(cfg: VanillaConfig, seq_len: int) -> Flops:
    """Of one block, per token."""
    attention_weights = 2 * cfg.d_model**2 + 2 * cfg.d_model * cfg.kv_heads * cfg.head_width
    mlp_weights = (3 if cfg.use_swiglu else 2) * cfg.d_model * cfg.hidden_width
    keys = mean_keys(seq_len, cfg.sliding_window)
    return decoder_flops(attention_weights + mlp_weights, [keys], cfg.d_model, [seq_len])


class Vanilla(HuggingFaceDecoder):
    Config = VanillaConfig
    cfg: VanillaConfig
    hf, hf_prefix = ROWS["llama"], "model."  # `LlamaForCausalLM`
    hf_buffers = ("rotary_emb.inv_freq",)

    def __init__(self, cfg: VanillaConfig) -> None:
        super().__init__(cfg)
        rows = padded_vocabulary(self.vocab_size)
        self.embed_tokens = nn.Embedding(rows, cfg.d_model)
        self.positions = None if cfg.use_rope else nn.Embedding(cfg.n_ctx, cfg.d_model)
        self.layers = nn.ModuleList(self.new_block(layer) for layer in range(cfg.n_layers))
        self.norm = self.new_norm()
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, rows, bias=False)

    @property
    def stack(self) -> tuple[nn.ModuleList, nn.Module]:
        return self.layers, self.norm

    def embed(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None = None,
        **drawn: Any,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        past = self.check_input(tokens, doc_ids, cache, learned=self.positions is not None)
        x = self.embed_tokens(tokens)  # (B, T, D)
        if self.positions is not None:
            x = x + self.positions(positions_of(tokens, past, doc_ids))
        x = F.dropout(x, self.cfg.dropout, self.training)
        return x, self.shared(tokens, past, doc_ids, cu_seqlens, **drawn)

    def shared(
        self, tokens: Tensor, past: int, doc_ids: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Any, ...]:
        """The plan of attention and the rotation."""
        table, rotation = self.embedding_weight, None
        if self.positions is None:
            index = torch.arange(past, past + tokens.shape[1], device=tokens.device)  # (T,)
            rotation = rotary_tables(index, self.cfg.head_width, self.cfg.rope_theta, table.dtype)
        visible = Visible.causally(
            tokens, past, window=self.cfg.sliding_window, doc_ids=doc_ids, cu_seqlens=cu_seqlens
        )
        return self.plan(visible, compute_dtype(table)), rotation

    def plan(self, visible: Visible, dtype: torch.dtype) -> Plan:
        """How layers attend to what is visible."""
        dropout = self.attention_dropout if self.training else 0.0
        return plan_attention(visible, dtype=dtype, dropout=dropout, kernels=self.kernels, **self._heads)

    @property
    def attention_dropout(self) -> float:
        """Of attention probabilities."""
        return self.cfg.dropout

    @property
    def _heads(self) -> dict[str, Any]:
        c = self.cfg
        return {"heads": (c.n_heads, c.kv_heads), "width": c.head_width, "softcap": c.attn_softcap}

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        facts = training_facts(seq_len, window=self.cfg.sliding_window)
        return {"attention": attention_call(facts, dropout=self.attention_dropout, **self._heads)}

    @property
    def embedding_weight(self) -> Tensor:
        return self.embed_tokens.weight

    def new_block(self, layer: int) -> nn.Module:
        return Block(self.cfg, layer)

    def new_norm(self) -> nn.Module:
        return self.cfg.norm(self.cfg.d_model)

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """N(0, 0.02^2), residual projections N(0, (0.02 / sqrt(2L))^2), biases 0, gains 1."""
        for name, module in part.named_modules():
            self.init_module(name, module, generator)

    def init_module(self, name: str, module: nn.Module, generator: torch.Generator) -> None:
        """As `init_part`, of the parameters of `module` itself."""
        if isinstance(module, RMSNorm | LayerNorm):
            module.init_weights()
        elif isinstance(module, nn.Embedding):
            normal_(module.weight, self.init_std, generator)
        elif isinstance(module, nn.Linear):
            residual = name.endswith(("o_proj", "down_proj"))
            std = residual_std(self.cfg.n_layers, self.init_std) if residual else self.init_std
            normal_(module.weight, std, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def blocks(self) -> list[str]:
        return [f"layers.{layer}" for layer in range(self.cfg.n_layers)]

    @property
    def init_std(self) -> float:
        """Of matrices that do not write to the residual stream."""
        return INIT_STD

    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    def param_roles(self) -> list[Rule]:
        return [
            Rule(r"(embed_tokens|positions)\.weight", "embedding"),
            Rule(r"lm_head\.weight", "head"),
            Rule(r".*(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight", "matrix"),
            Rule(r"(.*(_layernorm|q_norm|k_norm)|norm)\.weight|.*\.bias", "scalar"),
        ]

    def block_flops(self, seq_len: int) -> Flops:
        return block_flops(self.cfg, seq_len)

    def flops(self, seq_len: int) -> Flops:
        return self.block_flops(seq_len) * self.cfg.n_layers + matmul_flops(self.head_weight.numel())
