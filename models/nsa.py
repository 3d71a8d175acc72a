"""Native sparse attention: each token reads summaries of all that came before, the few blocks that these rank highest,
and the last tokens.

Yuan et al. 2025, "Native Sparse Attention" (arXiv:2502.11089);
the three branches are in `models/sparse/`. Around them the control: RMSNorm, SwiGLU, rotary positions, no biases.
Parameters are named as in `fla`, whose model is this one with means for summaries, one projection for all branches, and
gates of a single matrix (`configs/papers/nsa_fla.yaml`).

Shapes: B rows, T tokens, D width, V_p padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention_call, training_facts
from kernels.precision import compute_dtype
from models.layers.cache import Cache
from models.layers.decoder import Decoder, padded_vocabulary
from models.layers.flops import Flops, matmul_flops
from models.layers.init import normal_
from models.layers.norms import RMSNorm
from models.layers.roles import Rule
from models.sparse.cache import SparseCache
from models.sparse.config import NSAConfig
from models.sparse.flops import sparse_attention_flops
from models.sparse.gates import Gates
from models.sparse.mixer import Layout, SparseAttention, layout_of
from models.sparse.summaries import Mean, Summary
from models.vanilla import MLP
from naming import require_fit, shapes

__all__ = ["NSA", "NSAConfig"]


class Block(nn.Module):
    def __init__(self, cfg: NSAConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = SparseAttention(cfg, layer)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = MLP(cfg)  # type: ignore[arg-type]  # it has what that one reads
        self.dropout = cfg.dropout

    def forward(self, x: Tensor, layout: Layout, cache: SparseCache | None = None) -> Tensor:
        branch = self.attn(self.attn_norm(x), layout, cache)
        x, y = self.mlp_norm(x, F.dropout(branch, self.dropout, self.training))
        return x + self.mlp(y)


class NSA(Decoder):
    Config = NSAConfig
    cfg: NSAConfig

    def __init__(self, cfg: NSAConfig) -> None:
        super().__init__(cfg)
        rows = padded_vocabulary(self.vocab_size)
        self.embeddings = nn.Embedding(rows, cfg.d_model)
        self.layers = nn.ModuleList(self.new_block(layer) for layer in range(cfg.n_layers))
        self.norm = self.new_norm()
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, rows, bias=False)

    @property
    def stack(self) -> tuple[nn.ModuleList, nn.Module]:
        return self.layers, self.norm

    @property
    def embedding_weight(self) -> Tensor:
        return self.embeddings.weight

    def embed(
        self, tokens: Tensor, doc_ids: Tensor | None, cache: Cache | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Layout]]:
        past = self.check_input(tokens, doc_ids, cache, learned=False)
        x = F.dropout(self.embeddings(tokens), self.cfg.dropout, self.training)
        return x, self.shared(tokens, past, doc_ids, cu_seqlens)

    def shared(
        self, tokens: Tensor, past: int, doc_ids: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Layout]:
        dtype = compute_dtype(self.embeddings.weight)
        return (layout_of(self.cfg, tokens, past, doc_ids, cu_seqlens, dtype, self.kernels),)

    def init_cache(self, rows: int) -> SparseCache:
        c = self.cfg
        return SparseCache(c.n_layers, rows, c.sliding_window, c.compress_block_size, c.stride)

    def new_block(self, layer: int) -> nn.Module:
        return Block(self.cfg, layer)

    def new_norm(self) -> nn.Module:
        return RMSNorm(self.cfg.d_model, self.cfg.norm_eps)

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """N(0, initializer_range^2), residual projections smaller by sqrt(2L); of a summary's MLP N(0, 1 / fan-in);
        places 0, and gates as `gate_bias_init` says, whatever the token."""
        std = self.cfg.initializer_range
        own = {
            m for module in part.modules() if isinstance(module, Summary | Gates) for m in module.modules()
        }
        for name, module in part.named_modules():
            if isinstance(module, Summary | Mean):
                module.init_weights(generator)
            elif isinstance(module, Gates):
                module.init_weights(generator, std)
            elif isinstance(module, RMSNorm):
                module.init_weights()
            elif isinstance(module, nn.Embedding):
                normal_(module.weight, std, generator)
            elif isinstance(module, nn.Linear) and module not in own:
                residual = name.endswith(("o_proj", "down_proj"))
                normal_(module.weight, std / (2 * self.cfg.n_layers) ** 0.5 if residual else std, generator)

    def blocks(self) -> list[str]:
        return [f"layers.{layer}" for layer in range(self.cfg.n_layers)]

    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    def param_roles(self) -> list[Rule]:
        branches = self.cfg.projections
        return [
            Rule(r"embeddings\.weight", "embedding"),
            Rule(r"lm_head\.weight", "head"),
            Rule(r".*attn\.[kv]_proj\.weight", "matrix", split=branches),
            Rule(r".*(attn\.[qo]_proj|mlp\.(gate|up|down)_proj)\.weight", "matrix"),
            # A summary's MLP reads a block of keys, not a hidden state of the model's width.
            Rule(r".*compress_[kv]\.(up|down)\.weight", "matrix", width_power=0.0),
            Rule(r".*g_proj\.(hidden|out)\.weight", "router"),
            Rule(r".*(norm\.weight|bias|places)", "scalar", wd_mult=0.0),
        ]

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        c = self.cfg
        facts = training_facts(seq_len, window=c.sliding_window)
        return {"attention": attention_call(facts, (c.n_heads, c.n_kv_heads), max(c.head_dim, c.value_dim))}

    # -- operations ----------------------------------------------------------------------------------------------

    def block_flops(self, seq_len: int) -> Flops:
        """Of one block, per token."""
        mlp = matmul_flops(3 * self.cfg.d_model * self.cfg.hidden_width)
        return sparse_attention_flops(self.cfg, seq_len) + mlp

    def flops(self, seq_len: int) -> Flops:
        return self.block_flops(seq_len) * self.cfg.n_layers + matmul_flops(self.head_weight.numel())

    # -- files of fla ----------------------------------------------------------------------------------------------

    def to_fla_state_dict(self) -> dict[str, Tensor]:
        """Copies of the weights as `fla`'s `NSAForCausalLM` names them, without padding. ValueError where its model
        cannot be what this configuration says."""
        return {name: view.clone(memory_format=torch.contiguous_format) for name, view in self._fla().items()}

    def from_fla_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load such weights. ValueError if a key is missing or left over, or if a shape differs; nothing is loaded
        then."""
        views = self._fla()
        require_fit("this state dict of fla", shapes(views), shapes(state))
        with torch.no_grad():
            for name, view in views.items():
                view.copy_(state[name])
            for padded in {self.embedding_weight, self.head_weight}:
                padded[self.vocab_size :] = 0.0

    def _fla(self) -> dict[str, Tensor]:
        c = self.cfg
        needed = {
            "compression": (c.compression, "mean"),
            "share_branch_kv": (c.share_branch_kv, True),
            "compress_rope": (c.compress_rope, True),
            "gate_hidden_dim": (c.gate_hidden_dim, 0),
            "compress_block_size": (c.compress_block_size, c.selection_block_size),
            "num_init_blocks": (c.num_init_blocks, 0),
            "num_local_blocks": (c.num_local_blocks, 1),
        }
        if wrong := [
            f"{name}={theirs} (not {ours})" for name, (ours, theirs) in needed.items() if ours != theirs
        ]:
            raise ValueError(f"fla's model needs {', '.join(wrong)}")
        found = {}
        for name, parameter in self.named_parameters():
            theirs = name.replace("g_proj.out.", "g_proj.")
            padded = parameter is self.embedding_weight or parameter is self.head_weight
            found[theirs if theirs == "lm_head.weight" else f"model.{theirs}"] = (
                parameter.detach()[: self.vocab_size] if padded else parameter.detach()
            )
        found.setdefault("lm_head.weight", found["model.embeddings.weight"])
        return found
