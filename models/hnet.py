"""H-Net: bytes in, and chunks of them that the model itself cuts (Hwang, Wang and Gu 2025, "Dynamic Chunking for
End-to-End Hierarchical Sequence Modeling", arXiv:2507.07955).

A small encoder reads every byte; a router opens a chunk where neighbours differ; only what opens a chunk goes through
the wide network within, which may be such a hierarchy again; a decoder reads every byte once more. `models/hierarchy/`
has the parts. Parameters are named as in the checkpoints of its authors.

Shapes: B rows, T bytes, D width of the outermost stage, S stages that cut chunks, V vocabulary, V_p padded vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.hierarchy.cache import HierarchyCache
from models.hierarchy.config import HierarchyConfig, HNetConfig
from models.hierarchy.places import bytes_of
from models.hierarchy.stage import Stage, Told
from models.layers.cache import Cache
from models.layers.decoder import Decoder, Hidden, padded_vocabulary
from models.layers.flops import Flops, matmul_flops
from models.layers.init import INIT_STD, normal_
from models.layers.roles import Rule
from models.state_space.dual import DualMixer
from naming import shorten

__all__ = ["HNet", "HNetConfig"]

PUBLISHED_IDS, PUBLISHED_START = 256, 254  # of the authors' files: bytes, and the one that a text begins with


class HNet(Decoder):
    Config: type[HierarchyConfig] = HNetConfig
    cfg: HierarchyConfig  # type: ignore[assignment]  # its sizes are those of several stages

    def __init__(self, cfg: HierarchyConfig) -> None:
        super().__init__(cfg)  # type: ignore[arg-type]
        rows, width = padded_vocabulary(self.vocab_size), cfg.widths[0]
        self.embeddings = nn.Embedding(rows, width)
        self.backbone = Stage(cfg)
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(width, rows, bias=False)

    @property
    def embedding_weight(self) -> Tensor:
        return self.embeddings.weight

    def forward(  # type: ignore[override]  # nothing is drawn
        self,
        tokens: Tensor,
        doc_ids: Tensor | None = None,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Hidden:
        """tokens (B, T) int64 -> hidden (B, T, D) behind the decoder's norm; of text as a whole also what each stage
        tells of its chunks (`models.hierarchy.stage.Told`).

        doc_ids (B, T): neither states nor attention nor chunks cross a change of them. None: one document per row.
        cu_seqlens (N + 1,): the same as offsets. With a cache the tokens continue what it holds.
        """
        self.check_input(tokens, doc_ids, cache, learned=False)
        x = self.embeddings(tokens)
        if isinstance(cache, HierarchyCache):
            x = self.backbone.step(x, cache.all_rows(tokens.device))
            cache.advance(tokens.shape[1])
            return Hidden(x)
        told = Told()
        laid = self.laid(tokens)
        places = bytes_of(tokens, doc_ids, padded=laid == "padded")
        offsets = None if doc_ids is None else cu_seqlens
        x = self.backbone(x, places, laid == "packed", told, offsets)
        return Hidden(x, told.stacked())

    def laid(self, tokens: Tensor) -> str:
        """How chunks are laid (`models/hierarchy/places.py`): packed; padded where blocks are compiled, which are to
        see few shapes; masked where nothing can be told the host, without data or compiled as a whole."""
        if tokens.is_meta:
            return "masked"
        if self.cfg.chunk_execution != "auto":
            return self.cfg.chunk_execution
        if torch.compiler.is_compiling():
            return "masked"
        compiled = any(self.get_submodule(path)._compiled_call_impl is not None for path in self.blocks())
        return "padded" if compiled else "packed"

    def init_cache(self, rows: int) -> HierarchyCache:
        return HierarchyCache(rows, *self.backbone.empty(rows))

    def init_weights(self, generator: torch.Generator) -> None:
        """As the authors' code begins (`hnet/utils/train.py`): embeddings N(0, 1), all Linears N(0, 0.02^2), what
        writes to a residual stream smaller by the root of how many do."""
        normal_(self.embeddings.weight, 1.0, generator)
        self.backbone.init_weights(generator)
        if self.lm_head is not None:
            normal_(self.lm_head.weight, INIT_STD, generator)

    def blocks(self) -> list[str]:
        return [f"backbone.{path}" for path in self.backbone.blocks()]

    @property
    def kept_passes(self) -> float:
        """A block within is passed by chunks, of which a byte has a part."""
        passes, share = 0.0, 1.0
        for stage in self.cfg.stages:
            passes += share * sum(map(len, stage.layers)) * stage.width / self.cfg.widths[-1]
            share /= stage.ratio or 1.0
        return passes

    def param_roles(self) -> list[Rule]:
        """Rates of each stage are lambda^s times the run's; embedding and head have those of the outermost. What is
        marked in the authors' code as free of decay is, and so are all vectors."""
        outermost, rules = self.cfg.lr_multipliers[0], []
        for number, rate in enumerate(self.cfg.lr_multipliers):
            rules += self._roles_of(number, rate)
        return [
            Rule(r"embeddings\.weight", "embedding", outermost),
            Rule(r"lm_head\.weight", "head", outermost),
            *rules,
        ]

    def layers_in(self, number: int) -> str:
        """A pattern of what stands before the names in a layer of this stage."""
        here = re.escape("backbone." + "main_network." * number)
        innermost = self.cfg.stages[number].ratio is None
        return here + rf"({'main_network' if innermost else 'encoder|decoder'})\.layers\.\d+\."

    def _roles_of(self, number: int, rate: float) -> list[Rule]:
        sizes = self.cfg.stages[number]
        here = re.escape("backbone." + "main_network." * number)
        layer = self.layers_in(number)
        fused = DualMixer.parts(self.cfg.mixer(sizes.width))
        return [
            Rule(layer + r"mixer\.in_proj\.weight", "matrix", rate, split=fused),
            Rule(layer + r"mixer\.Wqkv\.weight", "matrix", rate, split=3),
            Rule(layer + r"mlp\.fc1\.weight", "matrix", rate, split=2),
            Rule(layer + r"(mixer\.out_proj|mlp\.fc2)\.weight", "matrix", rate),
            Rule(here + r"(residual_proj|pooling\.(up|down))\.weight", "matrix", rate),
            Rule(here + r"routing_module\.[qk]_proj_layer\.weight", "router", rate),
            Rule(
                layer + r"(mixer\.(A_log|D|dt_bias|conv1d\..*|norm\.weight)|norm[12]\.weight)",
                "scalar",
                rate,
                0.0,
            ),
            Rule(
                here
                + r"((encoder|decoder|main_network)\.rmsnorm\.weight|(residual_proj|pooling\.(up|down))\.bias"
                + r"|pad_dimension)",
                "scalar",
                rate,
                0.0,
            ),
        ]

    def flops(self, seq_len: int) -> Flops:
        """With chunks as long as they are aimed to be."""
        lengths = [float(seq_len)]
        for ratio in self.cfg.ratios:
            lengths.append(lengths[-1] / ratio)
        return self.flops_of(lengths, seq_len)

    def flops_of(self, lengths: list[Any], longest: int) -> Flops:
        """Per byte, where a row holds so many places of each stage, the first being its `longest` bytes: numbers, or
        tensors of one shape."""
        return self.backbone.flops(lengths, longest) + matmul_flops(self.head_weight.numel())

    # -- files of others -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def from_published_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load weights as the authors publish them, of 256 ids. There a text begins with byte 254, which occurs in no
        UTF-8; here documents begin with id 256, which takes its rows. ValueError where names or shapes do not fit."""
        own = self.state_dict()
        if wrong := sorted(own.keys() ^ state.keys()):
            raise ValueError(f"names are not those of this model; missing or unknown: {shorten(wrong)}")
        if self.vocab_size != PUBLISHED_IDS + 1:
            raise ValueError(
                f"vocab_size: published weights are of bytes, which are {PUBLISHED_IDS + 1} ids here, got "
                f"{self.vocab_size}; nearest {PUBLISHED_IDS + 1}"
            )
        tables = {"embeddings.weight", "lm_head.weight"}
        for name, tensor in state.items():
            wanted = (PUBLISHED_IDS, own[name].shape[1]) if name in tables else tuple(own[name].shape)
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"{name}: {wanted} is needed, got {tuple(tensor.shape)}")
        for name, tensor in state.items():
            if name in tables:
                own[name].zero_()[:PUBLISHED_IDS] = tensor
                own[name][PUBLISHED_IDS] = tensor[PUBLISHED_START]
            else:
                own[name].copy_(tensor)
