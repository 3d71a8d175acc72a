"""Mamba: states in place of attention, in both published versions.

Gu and Dao 2023, "Linear-Time Sequence Modeling with Selective State Spaces" (arXiv:2312.00752), and Dao and Gu 2024,
"Transformers are SSMs" (arXiv:2405.21060). A block is a mixer behind an RMSNorm (`models/state_space/`), which takes
the place of attention and MLP both; there are no positions. What text leaves behind is of one size, however long it is.
Parameters are named as in `transformers`, whose names but for one are those of the authors' code.

Shapes: B rows, T tokens, D width, V_p padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.documents import begins
from kernels.precision import at_least_fp32, compute_dtype
from models.huggingface import ROWS, Row, model_type_of
from models.layers.cache import Cache, StateCache
from models.layers.decoder import padded_vocabulary
from models.layers.flops import Flops, matmul_flops
from models.layers.huggingface import HuggingFaceDecoder
from models.layers.init import normal_
from models.layers.norms import RMSNorm
from models.layers.roles import Rule
from models.state_space.config import MambaConfig
from models.state_space.dual import DualMixer
from models.state_space.mixer import Documents, Mixer, State, kaiming_
from models.state_space.selective import SelectiveMixer

__all__ = ["Mamba", "MambaConfig"]

MIXERS: dict[int, type[SelectiveMixer] | type[DualMixer]] = {1: SelectiveMixer, 2: DualMixer}
# The one name that differs in the authors' files.
OURS, THEIRS = "backbone.embeddings.weight", "backbone.embedding.weight"


class GatedMLP(nn.Module):
    """fc2( up * silu(gate) ), up and gate the halves of fc1 x."""

    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(cfg.d_model, 2 * cfg.d_intermediate, bias=False)
        self.fc2 = nn.Linear(cfg.d_intermediate, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(up * F.silu(gate))


class Block(nn.Module):
    mixer: Mixer

    def __init__(self, cfg: MambaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mixer = MIXERS[cfg.version](cfg)
        self.norm2 = RMSNorm(cfg.d_model, cfg.norm_eps) if cfg.d_intermediate else None
        self.mlp = GatedMLP(cfg) if cfg.d_intermediate else None

    def forward(self, x: Tensor, documents: Documents | None, cache: StateCache | None = None) -> Tensor:
        """x (B, T, D), whose dtype the residual stream keeps."""
        state = None if cache is None else State(cache[f"recent_{self.layer}"], cache[f"states_{self.layer}"])
        branch, after = self.mixer(self.norm(x), documents, state)
        if cache is not None:
            cache[f"recent_{self.layer}"], cache[f"states_{self.layer}"] = after
        if self.norm2 is not None and self.mlp is not None:
            x, y = self.norm2(x, branch.to(x.dtype))
            branch = self.mlp(y)
        return x + branch.to(x.dtype)


class Mamba(HuggingFaceDecoder):
    Config = MambaConfig
    cfg: MambaConfig  # type: ignore[assignment]  # it has neither heads of attention nor a context
    hf_prefix, hf_buffers = "backbone.", ()
    hf_exact = (".A_log", ".D", ".dt_proj.bias", ".dt_bias")
    max_context = None  # nothing slides: the states carry all that there was

    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__(cfg)  # type: ignore[arg-type]
        rows = padded_vocabulary(self.vocab_size)
        self.embeddings = nn.Embedding(rows, cfg.d_model)
        self.layers = nn.ModuleList(self.new_block(layer) for layer in range(cfg.n_layers))
        self.norm_f = self.new_norm()
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, rows, bias=False)

    @property
    def stack(self) -> tuple[nn.ModuleList, nn.Module]:
        return self.layers, self.norm_f

    @property
    def embedding_weight(self) -> Tensor:
        return self.embeddings.weight

    def embed(
        self, tokens: Tensor, doc_ids: Tensor | None, cache: Cache | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Documents | None]]:
        past = self.check_input(tokens, doc_ids, cache, learned=False)
        narrow = compute_dtype(self.embeddings.weight)
        stream = at_least_fp32(narrow) if self.cfg.residual_in_fp32 else narrow
        return self.embeddings(tokens).to(stream), self.shared(tokens, past, doc_ids, cu_seqlens)

    def shared(
        self, tokens: Tensor, past: int, doc_ids: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Documents | None]:
        """Where documents begin."""
        if doc_ids is None:
            return (None,)
        return (Documents(doc_ids, begins(doc_ids)),)

    def init_cache(self, rows: int) -> StateCache:
        parts: dict[str, Tensor] = {}
        for layer, mixer in enumerate(self._mixers):
            empty = mixer.empty(rows)
            parts |= {f"recent_{layer}": empty.recent, f"states_{layer}": empty.states}
        return StateCache(**parts)

    @property
    def _mixers(self) -> list[Mixer]:
        return [block.mixer for block in self.layers if isinstance(block, Block)]

    def new_block(self, layer: int) -> nn.Module:
        return Block(self.cfg, layer)

    def new_norm(self) -> nn.Module:
        return RMSNorm(self.cfg.d_model, self.cfg.norm_eps)

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        normal_(self.embeddings.weight, self.cfg.initializer_range, generator)
        if self.lm_head is not None:
            kaiming_(self.lm_head, generator)

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """As the authors' code begins (`modules/mamba_simple.py`, `modules/mamba2.py`, `_init_weights`): Linears and
        convolutions as torch begins them, what writes to the residual stream smaller by sqrt(L)."""
        for module in part.modules():
            if isinstance(module, Mixer):
                module.init_weights(generator)
            elif isinstance(module, RMSNorm):
                module.init_weights()
            elif isinstance(module, GatedMLP):
                kaiming_(module.fc1, generator)
                kaiming_(module.fc2, generator)
                if self.cfg.rescale_prenorm_residual:
                    with torch.no_grad():
                        module.fc2.weight /= math.sqrt(self.cfg.n_layers)

    def blocks(self) -> list[str]:
        return [f"layers.{layer}" for layer in range(self.cfg.n_layers)]

    lora_targets = ("in_proj", "out_proj")

    def param_roles(self) -> list[Rule]:
        """Rates of decay, step sizes and the convolution are vectors to the optimizer, whatever their shape: no decay
        of weights, no orthogonalisation."""
        cfg = self.cfg
        fused: tuple[int, ...] = (cfg.inner, cfg.inner) if cfg.version == 1 else DualMixer.parts(cfg)
        return [
            Rule(r"embeddings\.weight", "embedding"),
            Rule(r"lm_head\.weight", "head"),
            Rule(r".*mixer\.in_proj\.weight", "matrix", split=fused),
            Rule(r".*mixer\.x_proj\.weight", "matrix", split=(cfg.rank, cfg.states, cfg.states)),
            Rule(r".*mixer\.(dt_proj|out_proj)\.weight", "matrix"),
            Rule(r".*mlp\.fc1\.weight", "matrix", split=2),
            Rule(r".*mlp\.fc2\.weight", "matrix"),
            Rule(
                r".*(A_log|\.D|dt_bias|bias|conv1d\.weight|norm2?\.weight)|norm_f\.weight",
                "scalar",
                wd_mult=0.0,
            ),
        ]

    def block_flops(self, seq_len: int) -> Flops:
        return self._mixers[0].flops(seq_len) + matmul_flops(3 * self.cfg.d_model * self.cfg.d_intermediate)

    def flops(self, seq_len: int) -> Flops:
        return self.block_flops(seq_len) * self.cfg.n_layers + matmul_flops(self.head_weight.numel())

    # -- files of others -------------------------------------------------------------------------------------------

    @property
    def hf(self) -> Row:  # type: ignore[override]
        return ROWS[model_type_of("mamba", self.cfg)]

    def to_state_spaces_state_dict(self) -> dict[str, Tensor]:
        """Copies of the weights as the authors' `MambaLMHeadModel` names them, without padding."""
        views = self.hf_views()
        return {THEIRS if name == OURS else name: view.clone() for name, view in views.items()}

    def from_state_spaces_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load such weights; rows beyond the vocabulary, which pad it there, are left out. ValueError as
        `from_hf_state_dict`."""
        table = self.vocab_size
        renamed = {OURS if name == THEIRS else name: tensor for name, tensor in state.items()}
        padded = {OURS, "lm_head.weight"}
        self.from_hf_state_dict({n: t[:table] if n in padded else t for n, t in renamed.items()})
