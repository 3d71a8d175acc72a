"""An H-Net whose innermost stage has native sparse attention, to chunks: its positions, blocks and windows count these,
not bytes.

H-Net: Hwang, Wang and Gu 2025 (arXiv:2507.07955), `models/hnet.py`. Native sparse attention: Yuan et al. 2025
(arXiv:2502.11089), `models/sparse/`. No paper has both; this is each as its own paper has it. Parameters are named as
in hnet, but those of sparse attention, which are named as in nsa. `chunking: fixed` is a baseline and no H-Net: every
stage makes chunks of N places by an MLP, each told to what is behind it alone (`models/hierarchy/pooling.py`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from configs.schema import NonNegative, Positive
from models.hierarchy.config import HierarchyConfig
from models.hierarchy.layout import layers_of
from models.hierarchy.sparse import ChunkAttention
from models.hnet import HNet
from models.layers.roles import Rule
from models.sparse.config import NSAConfig, SparseConfig
from naming import require_fit, shapes, shorten

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["HNetXNSA", "HNetXNSAConfig"]

MAIN = "main"
SELECTED = 1  # of the branches
SHARED = (*SparseConfig.model_fields, "norm_eps")  # fields that the layers of a sparse stage read


def _stack(code: str) -> str:
    layers_of(code)
    return code


class ChunkNSAConfig(NSAConfig):
    """Of the layers of one stage."""

    rotary_emb_dim: Positive | None = None

    @property
    def turning(self) -> int:
        return self.rotary_emb_dim or self.head_dim


class HNetXNSAConfig(SparseConfig, HierarchyConfig):
    """Defaults are a model of 128 million parameters, whose bytes are cut into chunks three times over."""

    n_compress_decompress_layers: Positive = 3  # stages that cut chunks, each within the one before
    compression_decompress_size: Annotated[float, Field(gt=1, allow_inf_nan=False)] = (
        8.0  # bytes of an innermost chunk
    )
    n_inner_layers: Positive = 12  # of the innermost stage, attention and feed-forward each
    stage_layout: Annotated[str, AfterValidator(_stack)] = "m4"  # of each encoder and decoder
    nsa_stages: Annotated[list[Literal["main"] | NonNegative], Field(min_length=1)] = ["main"]
    rotary_emb_dim: Positive | None = None  # dims of a head that turn; None = all of it
    # Of sparse attention, in chunks. A row has fewer of them than of tokens.
    sliding_window: Positive = 128
    compress_block_size: Positive = 16
    compress_stride: Positive | None = 8
    selection_block_size: Positive = 32
    num_selected_blocks: Positive = 8

    tiny = {
        "n_compress_decompress_layers": 1,
        "compression_decompress_size": 2.0,
        "n_inner_layers": 1,
        "stage_layout": "m1",
        "n_heads": 4,
        "sliding_window": 3,
        "compress_block_size": 2,
        "compress_stride": 1,
        "selection_block_size": 2,
        "num_selected_blocks": 4,
    }
    examples = {
        "n_compress_decompress_layers": 2,
        "compression_decompress_size": 3.0,
        "stage_layout": "m1T1",
        "nsa_stages": (["main", 0], {"stage_layout": "T1"}),
        "rotary_emb_dim": 8,
        "compress_stride": 2,
        "compress_block_size": 1,
        "selection_block_size": 4,
        "num_selected_blocks": 3,
        "compression": ("mean", {"compress_stride": 2}),
    }
    own_sizes = frozenset({"n_layers"})
    pools = True
    counted_by = "model_cfg.n_compress_decompress_layers"
    laid_out_by = "stage_layout"
    depth_field = "n_inner_layers"

    # -- what follows for each stage -------------------------------------------------------------------------------

    @property
    def layout(self) -> list[Any]:
        found: list[Any] = [f"T{self.n_inner_layers}"]
        for _ in range(self.n_compress_decompress_layers):
            found = [self.stage_layout, found, self.stage_layout]
        return found

    @property
    def heads(self) -> list[int]:
        """Outer ones as wide as `head_dim`."""
        return [*(max(1, round(width / self.head_dim)) for width in self.widths[:-1]), self.n_heads]

    @property
    def ratios(self) -> list[float]:
        """N of each stage, whose product is `compression_decompress_size`."""
        stages = self.n_compress_decompress_layers
        root = self.compression_decompress_size ** (1 / stages)
        # The root of 64 is 3.9999999999999996.
        whole = round(root)
        return [float(whole) if whole**stages == self.compression_decompress_size else root] * stages

    def sparse(self, stage: int) -> NSAConfig | None:
        name = MAIN if stage == self.n_compress_decompress_layers else stage
        if name not in self.nsa_stages:
            return None
        values = {name: getattr(self, name) for name in SHARED}
        return ChunkNSAConfig(d_model=self.widths[stage], rotary_emb_dim=self.rotary_emb_dim, **values)

    # -- what does not fit -----------------------------------------------------------------------------------------

    def problems(self, run: RunConfig) -> list[str]:
        if found := super().problems(run):
            return found
        return self._places() or self._of_heads()

    def _places(self) -> list[str]:
        found, last = [], self.n_compress_decompress_layers
        attending = [
            MAIN if number == last else number
            for number, stage in enumerate(self.kinds)
            if set("".join(stage)) & {"t", "T"}
        ]
        if wrong := [str(name) for name in self.nsa_stages if name not in attending]:
            found.append(
                f"model_cfg.nsa_stages ({self.nsa_stages}) names {shorten(wrong)}; stages with attention (T or t in "
                f"model_cfg.stage_layout, {self.stage_layout}) are {shorten([str(name) for name in attending])}. "
                f"Nearest: {attending}"
            )
        elif len(once := list(dict.fromkeys(self.nsa_stages))) < len(self.nsa_stages):
            found.append(f"model_cfg.nsa_stages ({self.nsa_stages}) names a stage twice. Nearest: {once}")
        return found

    def _of_heads(self) -> list[str]:
        found, turning = self.head_problems() + self.block_problems(), self.rotary_emb_dim
        if turning is not None and (turning % 2 or turning > self.head_dim):
            found.append(
                f"model_cfg.rotary_emb_dim ({turning}) must be even and at most model_cfg.head_dim "
                f"({self.head_dim}). Nearest: {max(2, min(turning // 2 * 2, self.head_dim))}"
            )
        return found

    def ratio_problem(self, number: int, ratio: float) -> str:
        stages, size = self.n_compress_decompress_layers, self.compression_decompress_size
        return (
            f"model_cfg.compression_decompress_size ({size}) must be a whole number to the power of "
            f"model_cfg.n_compress_decompress_layers ({stages}) where model_cfg.chunking is fixed. Nearest: "
            f"{max(2, round(ratio)) ** stages}"
        )

    def remarks(self, run: RunConfig) -> list[str]:
        selected = self.num_selected_blocks * self.selection_block_size
        chunks = run.train_seq_len / math.prod(self.ratios)
        if MAIN not in self.nsa_stages or selected < chunks:
            return super().remarks(run)
        return [
            *super().remarks(run),
            f"nothing is sparse in rows of {run.train_seq_len:,} bytes: they are about {chunks:,.0f} chunks, and "
            f"model_cfg.num_selected_blocks x model_cfg.selection_block_size ({selected:,}) are all of them",
        ]

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if self.chunking == "fixed":
            found["ema_eps"] = "chunking=fixed"
        return found


class HNetXNSA(HNet):
    Config = HNetXNSAConfig
    cfg: HNetXNSAConfig  # type: ignore[assignment]

    lora_targets = ("in_proj", "mixer.out_proj", "q_proj", "k_proj", "v_proj", "o_proj")

    def _roles_of(self, number: int, rate: float) -> list[Rule]:
        """Of a stage's sparse attention as in `nsa`, at the stage's rates; of the rest as in `hnet`."""
        sparse = self.cfg.stages[number].sparse
        if sparse is None:
            return super()._roles_of(number, rate)
        mixer = self.layers_in(number) + r"mixer\."
        return [
            Rule(mixer + r"[kv]_proj\.weight", "matrix", rate, split=sparse.projections),
            Rule(mixer + r"[qo]_proj\.weight", "matrix", rate),
            # A summary's MLP reads a block of keys, not a hidden state of the model's width.
            Rule(mixer + r"compress_[kv]\.(up|down)\.weight", "matrix", rate, width_power=0.0),
            Rule(mixer + r"g_proj\.(hidden|out)\.weight", "router", rate),
            Rule(mixer + r"(compress_[kv]|g_proj)\..*(bias|places)", "scalar", rate, 0.0),
            *super()._roles_of(number, rate),
        ]

    @torch.no_grad()
    def from_dense(self, dense: HNet) -> None:
        """Load the weights of an H-Net whose stages are as large: its attention becomes the selected branch, whose
        queries, keys and values these are; the other branches, summaries and gates stay as they are.

        Raises:
            ValueError: heads, or dims that turn, are others, or names or shapes do not fit. Nothing is loaded then.
        """
        for theirs, own in zip(dense.cfg.stages, self.cfg.stages, strict=False):
            if own.sparse is not None:
                self._require_heads(own.sparse, theirs.heads, theirs.head_width, theirs.turning)
        target: dict[str, Tensor] = {}
        for path, module in self.named_modules():
            if isinstance(module, ChunkAttention):
                of_keys, of_values = (
                    p.weight.chunk(module.cfg.projections)[SELECTED] for p in (module.k_proj, module.v_proj)
                )
                for name, view in zip("qkv", (module.q_proj.weight, of_keys, of_values), strict=True):
                    target[f"{path}.{name}"] = view
                target[f"{path}.out_proj.weight"] = module.o_proj.weight
        inside = tuple(f"{name.rsplit('.', 1)[0]}." for name in target if name.endswith(".q"))
        own_state = self.state_dict()
        target |= {name: t for name, t in own_state.items() if not name.startswith(inside)}
        source: dict[str, Tensor] = {}
        for name, tensor in dense.state_dict().items():
            if name.startswith(inside) and name.endswith("Wqkv.weight"):
                path = name.removesuffix("Wqkv.weight")
                source |= {path + part: t for part, t in zip("qkv", tensor.chunk(3), strict=True)}
            else:
                source[name] = tensor
        require_fit("this H-Net", shapes(target), shapes(source))
        for name, view in target.items():
            view.copy_(source[name])

    def _require_heads(self, own: NSAConfig, heads: int, width: int, turning: int) -> None:
        needed = {
            "n_heads": (own.n_heads, heads),
            "n_kv_heads": (own.n_kv_heads, heads),
            "head_dim": (own.head_dim, width),
            "v_head_dim": (own.value_dim, width),
            "rotary_emb_dim": (own.turning, turning),
            "share_branch_kv": (own.share_branch_kv, False),
        }
        if wrong := [
            f"{name}={theirs} (not {ours})" for name, (ours, theirs) in needed.items() if ours != theirs
        ]:
            raise ValueError(f"the attention of this H-Net needs {', '.join(wrong)} here")
