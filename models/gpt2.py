"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; openai/gpt-2).

Learned positions, pre-norm LayerNorm, fused qkv, GELU in its tanh form, biases, tied head. Published
checkpoints load and give the same logits.

Shapes: B rows, T tokens, D width, H heads, h = D/H head width, V vocabulary, V_p padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from configs.schema import DefaultModelConfig, Dropout, Free, Positive, within_context
from kernels.attention import Plan, Visible, attention, attention_call, plan_attention, training_facts
from kernels.precision import compute_dtype
from models.huggingface import ROWS
from models.layers.cache import Cache, KVCache
from models.layers.decoder import padded_vocabulary, positions_of
from models.layers.flops import Flops, decoder_flops, matmul_flops, mean_keys
from models.layers.huggingface import HuggingFaceDecoder
from models.layers.init import INIT_STD, normal_, residual_std
from models.layers.norms import LayerNorm
from models.layers.roles import Rule

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["GPT2", "GPT2Config"]

NORM_EPS = 1e-5
# Linear layers whose weights GPT-2 files store as (in, out), the layout of their `Conv1D`.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class GPT2Config(DefaultModelConfig):
    """Defaults are the released 124M model. Medium, large and xl are (n_layers, d_model, n_heads) =
    (24, 1024, 16), (36, 1280, 20) and (48, 1600, 25)."""

    dropout: Free[Dropout] = (
        0.0  # of embeddings, attention probabilities and what blocks add; 0.1 in the paper
    )
    ffn_hidden: Positive | None = None  # None = 4 d_model
    bias: bool = True  # False: none in any linear or norm
    pad_vocab: bool = True  # embedding rows up to a multiple of 128, never predicted
    wpe_init_std: Annotated[float, Field(gt=0, allow_inf_nan=False)] = INIT_STD  # 0.01 in OpenAI's code
    tie_embeddings: bool = True

    @property
    def hidden_width(self) -> int:
        """Of the feed-forward layer."""
        return self.ffn_hidden or 4 * self.d_model

    def problems(self, run: RunConfig) -> list[str]:
        return super().problems(run) + within_context(run, self.n_ctx)


class Attention(nn.Module):
    def __init__(self, cfg: GPT2Config, layer: int) -> None:
        super().__init__()
        self.n_heads, self.dropout, self.layer = cfg.n_heads, cfg.dropout, layer
        self.c_attn = nn.Linear(cfg.d_model, 3 * cfg.d_model, bias=cfg.bias)
        self.c_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor, plan: Plan, cache: KVCache | None) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, H, h)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # (B, H, T, h)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = attention(q, k, v, plan)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, cfg: GPT2Config) -> None:
        super().__init__()
        self.dropout = cfg.dropout
        self.c_fc = nn.Linear(cfg.d_model, cfg.hidden_width, bias=cfg.bias)
        self.c_proj = nn.Linear(cfg.hidden_width, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # the erf form does not reproduce released weights
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, cfg: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(cfg.d_model, NORM_EPS, cfg.bias)
        self.attn = Attention(cfg, layer)
        self.ln_2 = LayerNorm(cfg.d_model, NORM_EPS, cfg.bias)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, plan: Plan, cache: KVCache | None = None) -> Tensor:
        x, y = self.ln_2(x, self.attn(self.ln_1(x), plan, cache))
        return x + self.mlp(y)


class GPT2(HuggingFaceDecoder):
    Config = GPT2Config
    cfg: GPT2Config
    hf, hf_prefix, hf_transposed = ROWS["gpt2"], "transformer.", True
    hf_buffers = (".attn.bias", ".attn.masked_bias")  # causal masks

    def __init__(self, cfg: GPT2Config) -> None:
        super().__init__(cfg)
        rows = padded_vocabulary(self.vocab_size) if cfg.pad_vocab else self.vocab_size
        self.wte = nn.Embedding(rows, cfg.d_model)
        self.wpe = nn.Embedding(cfg.n_ctx, cfg.d_model)
        self.h = nn.ModuleList(self.new_block(layer) for layer in range(cfg.n_layers))
        self.ln_f = self.new_norm()
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, rows, bias=False)

    @property
    def stack(self) -> tuple[nn.ModuleList, nn.Module]:
        return self.h, self.ln_f

    def embed(
        self, tokens: Tensor, doc_ids: Tensor | None, cache: Cache | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Plan]]:
        past = self.check_input(tokens, doc_ids, cache, learned=True)
        x = self.wte(tokens) + self.wpe(positions_of(tokens, past, doc_ids))  # (B, T, D)
        x = F.dropout(x, self.cfg.dropout, self.training)
        return x, self.shared(tokens, past, doc_ids, cu_seqlens)

    def shared(
        self, tokens: Tensor, past: int, doc_ids: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Plan]:
        """The plan of attention."""
        visible = Visible.causally(tokens, past, doc_ids=doc_ids, cu_seqlens=cu_seqlens)
        dtype = compute_dtype(self.wte.weight)
        dropout = self.cfg.dropout if self.training else 0.0
        return (plan_attention(visible, dtype=dtype, dropout=dropout, kernels=self.kernels, **self._heads),)

    @property
    def _heads(self) -> dict[str, Any]:
        return {"heads": (self.cfg.n_heads, self.cfg.n_heads), "width": self.cfg.d_model // self.cfg.n_heads}

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        facts = training_facts(seq_len)
        return {"attention": attention_call(facts, dropout=self.cfg.dropout, **self._heads)}

    @property
    def embedding_weight(self) -> Tensor:
        return self.wte.weight

    def new_block(self, layer: int) -> nn.Module:
        return Block(self.cfg, layer)

    def new_norm(self) -> nn.Module:
        return LayerNorm(self.cfg.d_model, NORM_EPS, self.cfg.bias)

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        normal_(self.wte.weight, INIT_STD, generator)
        normal_(self.wpe.weight, self.cfg.wpe_init_std, generator)

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """N(0, 0.02^2), residual projections N(0, (0.02 / sqrt(2L))^2), biases 0, gains 1."""
        for name, module in part.named_modules():
            if isinstance(module, LayerNorm):
                module.init_weights()
            elif isinstance(module, nn.Linear):
                residual = name.endswith("c_proj")
                normal_(module.weight, residual_std(self.cfg.n_layers) if residual else INIT_STD, generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def blocks(self) -> list[str]:
        return [f"h.{layer}" for layer in range(self.cfg.n_layers)]

    lora_targets = ("c_attn", "attn.c_proj")

    def param_roles(self) -> list[Rule]:
        return [
            Rule(r"(wte|wpe)\.weight", "embedding"),
            Rule(r"lm_head\.weight", "head"),
            Rule(r".*attn\.c_attn\.weight", "matrix", split=3),
            Rule(r".*(attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight", "matrix"),
            Rule(r"(.*\.)?(ln_1|ln_2|ln_f)\.weight|.*\.bias", "scalar"),
        ]

    def block_flops(self, seq_len: int) -> Flops:
        width = self.cfg.d_model
        return decoder_flops(
            4 * width**2 + 2 * width * self.cfg.hidden_width, [mean_keys(seq_len)], width, [seq_len]
        )

    def flops(self, seq_len: int) -> Flops:
        return self.block_flops(seq_len) * self.cfg.n_layers + matmul_flops(self.head_weight.numel())

    # -- the files of Hugging Face transformers (`GPT2LMHeadModel`) ------------------------------------------

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """As in the base class; a model without biases gets zero ones."""
        hf = super().to_hf_state_dict()
        if not self.cfg.bias:
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear | LayerNorm) and module is not self.lm_head:
                    hf[f"transformer.{name}.bias"] = module.weight.new_zeros(module.weight.shape[0])
        return hf

    def from_hf_state_dict(self, hf: Mapping[str, Tensor]) -> None:
        """As in the base class; a model without biases takes zero ones."""
        if not self.cfg.bias:
            hf = {name: t for name, t in hf.items() if not (name.endswith(".bias") and not t.any())}
        super().from_hf_state_dict(hf)

    def hf_views(self) -> dict[str, Tensor]:
        views = super().hf_views()
        return {name: view.T if name.endswith(TRANSPOSED) else view for name, view in views.items()}
