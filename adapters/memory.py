"""Next-token prediction with a memory, and on a pretrained base, with the base's tokenizer.

Shapes: B rows, S positions, R layers that choose, C chapters, K of them chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from adapters.base import Annotation, Context, LossTerm, Metric, Prepared, Spans, StepOutput
from adapters.default import DefaultModelAdapter
from data.cache import kept_digest
from data.huggingface.folder import read_huggingface_tokenizer
from kernels import REFERENCE
from kernels.choose import Kernels
from models.layers.decoder import Hidden
from models.memory.block import LOSSES
from models.memory.pretrained import model_digest

if TYPE_CHECKING:
    from configs.schema import ModelConfig
    from data.rows import Batch
    from data.tokenizers import Tokenizer
    from models.memory.adapter import MemoryAdapterConfig
    from models.memory.config import MemoryConfig

__all__ = ["MemoryModelAdapter", "PretrainedAdapter", "chapter_figures"]


class MemoryModelAdapter(DefaultModelAdapter):
    """Terms of runs that choose chapters, beside the cross-entropy: those of `LOSSES` that are switched on, means over
    the layers that choose. Metrics of these: `router_entropy`, nats of a decision, and `chapter_figures`.
    """

    @property
    def kernels(self) -> Kernels:
        return self._kernels

    @kernels.setter
    def kernels(self, kernels: Kernels) -> None:
        if not self.model_cfg.use_flash_attention:
            kernels = kernels.with_choice("attention", REFERENCE)
        DefaultModelAdapter.kernels.fset(self, kernels)  # type: ignore[attr-defined]

    @property
    def host_syncs(self) -> tuple[str, ...]:  # type: ignore[override]
        waits = ("nonzero", "bincount", "_to_copy", "_local_scalar_dense")
        return waits if self.model_cfg.routed else ()

    @classmethod
    def masks(cls, model_cfg: ModelConfig) -> str:
        cfg: Any = cast("MemoryConfig", model_cfg)
        return "chapters are chosen by all tokens of a document, those of padding too" if cfg.routed else ""

    @property
    def depends_on_split(self) -> str:
        c = self.model_cfg
        uneven = [n for n, (switch, weight) in LOSSES.items() if getattr(c, switch) and getattr(c, weight)]
        if c.routed and uneven:
            return f"the losses of routers ({', '.join(uneven)}) are those of a micro-batch of a process"
        return super().depends_on_split

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        """Also the host's `share`, of the step's rows, the denominator `rows` where chapters are chosen, and where they
        are by the whole text, `valid` (B, S) bool: all up to the last target that counts."""
        prepared = super().prepare(batch, ctx)
        prepared.host["share"] = len(batch.rows) / ctx.rows_in_step
        if not self.model_cfg.routed:
            return prepared
        prepared.denominators["rows"] = float(len(batch.rows))
        if self.model_cfg.looks_ahead:
            counted = torch.from_numpy((batch.weights > 0) | (batch.end_weights > 0))
            prepared.tensors["valid"] = counted.flip(1).cummax(1).values.flip(1)
        return prepared

    def drawn(self, prepared: Prepared) -> dict[str, Any]:
        valid = prepared.tensors.get("valid")
        return super().drawn(prepared) | ({} if valid is None else {"valid": valid})

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        output, inputs = super().step_output(hidden, prepared), prepared.tensors["inputs"]
        if self.model.banks:
            per_token = self.model.flops(inputs.shape[1]).training_per_token
            of_bank = prepared.host["share"] * self.model.bank_flops().training_per_token
            output.flops = per_token * inputs.numel() + of_bank
        told, rows = hidden.extra, len(inputs)
        if "load" not in told:
            return output
        for name, (switch, weight) in LOSSES.items():
            if getattr(self.model_cfg, switch) and (factor := getattr(self.model_cfg, weight)):
                total = told[name].mean() * rows
                output.terms[name] = LossTerm(total, "rows", factor, likelihood=False)
        decisions = told["decided"].sum()
        output.metrics["router_entropy"] = Metric(told["entropy"].sum(), decisions)
        output.metrics["chapters"] = Metric(told["load"], figures=chapter_figures)
        return output

    def annotate(self, text: str | bytes) -> Annotation:
        """The chapters that each token reads in every layer that chooses, the likeliest first."""
        if not self.model_cfg.routed:
            return Annotation()
        ctx = Context(seed=0, step=0, phase="eval", rows_in_step=1)
        hidden = self.hidden(self.prepare(self.one_row(text), ctx).to(self.device))
        shared = self.model_cfg.num_shared_chapters
        chosen = (hidden.extra["chosen"][:, 0, 1:] + shared).tolist()  # (R, L, K)
        return Annotation(
            tuple(
                Spans.by_token(f"layer {layer}: chapters", [" ".join(map(str, c)) for c in of_layer])
                for layer, of_layer in zip(self.model_cfg.memory_layers, chosen, strict=True)
            )
        )


def chapter_figures(load: Tensor) -> dict[str, float]:
    """Of decisions (R, C): `router_max_share`, the share of the chapter that most go to, a mean over layers;
    `router_dead_chapters`, of all layers, that none goes to; `chapter_<c>`, the share of those of that number."""
    load = load.double()
    total = load.sum()
    shares = load.sum(0) / total.clamp(min=1)  # (C,)
    of_layers = load / load.sum(1, keepdim=True).clamp(min=1)
    return {
        "router_max_share": float(of_layers.amax(1).mean()),
        "router_dead_chapters": float((load == 0).sum()),
        **{f"chapter_{c}": float(share) for c, share in enumerate(shares)},
    }


class PretrainedAdapter(DefaultModelAdapter):
    """Where the base is frozen, what it holds is in no checkpoint: the digest of its files binds it to one."""

    @classmethod
    def own_tokenizer(cls, model_cfg: ModelConfig) -> Tokenizer:
        """The base's, whose start token begins documents. ValueError where the base is not here or has none."""
        cfg: Any = cast("MemoryAdapterConfig", model_cfg)
        return read_huggingface_tokenizer(cfg.folder, cfg.base.vocab_size)

    def provenance(self) -> dict[str, str]:
        folder = self.model_cfg.folder
        if self.model_cfg.freeze_base_model:
            return {**super().provenance(), "base_model": model_digest(folder, kept_digest)}
        return {**super().provenance(), "base_config": model_digest(folder, None)}

    @property
    def notes(self) -> tuple[str, ...]:
        cfg, sizes = self.model_cfg, self.model.sizes
        how = "frozen" if cfg.freeze_base_model else "trained"
        return (
            f"base {cfg.base_model_name} ({self.model.config.model_type}, {sizes.n_layers} layers of width "
            f"{sizes.d_model}, {how})",
        )
