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
from models.layers.decoder import Hidden, document_positions
from models.memory.block import LOSSES
from models.memory.pretrained import model_digest
from models.memory.router import auxiliary, balance, squared_normaliser

if TYPE_CHECKING:
    from configs.schema import ModelConfig
    from data.rows import Batch
    from data.tokenizers import Tokenizer
    from models.memory.adapter import MemoryAdapterConfig
    from models.memory.config import MemoryConfig

__all__ = ["MemoryModelAdapter", "PretrainedAdapter", "chapter_figures", "openings"]


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
    def memory_cfg(self) -> MemoryConfig:
        return self.model.memory_cfg

    @property
    def host_syncs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("bincount", "_to_copy", "_local_scalar_dense") if self.memory_cfg.routed else ()

    @property
    def depends_on_split(self) -> str:
        if self.memory_cfg.routed and (uneven := self._losses):
            return f"the losses of routers ({', '.join(uneven)}) are those of a micro-batch of all processes"
        return super().depends_on_split

    @property
    def _losses(self) -> dict[str, float]:
        """Those of `LOSSES` that are switched on, with their weights."""
        c = self.memory_cfg
        return {
            name: weight
            for name, (switch, field) in LOSSES.items()
            if getattr(c, switch) and (weight := getattr(c, field))
        }

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        """Also the host's `share`, of the step's rows, and where chapters are chosen the denominator `rows`, `valid`
        (B, S) bool, all up to a row's last target that counts, of chats `openings` (B, S) int64, the tokens of each one
        before the first of an answer, and the host's `alone`: whether the other processes do something else, as where
        it is found out how many rows fit into memory."""
        prepared = super().prepare(batch, ctx)
        prepared.host["share"] = len(batch.rows) / ctx.rows_in_step
        if not self.memory_cfg.routed:
            return prepared
        prepared.denominators["rows"] = float(len(batch.rows))
        prepared.host["alone"] = ctx.of_draws != "drawn"
        counted = torch.from_numpy((batch.weights > 0) | (batch.end_weights > 0))
        prepared.tensors["valid"] = counted.flip(1).cummax(1).values.flip(1)
        if batch.chats:
            prepared.tensors["openings"] = openings(prepared.tensors["doc_ids"], prepared.tensors["weights"])
        return prepared

    def drawn(self, prepared: Prepared) -> dict[str, Any]:
        told = {name: prepared.tensors[name] for name in ("valid", "openings") if name in prepared.tensors}
        return super().drawn(prepared) | told

    @property
    def reads_openings(self) -> bool:  # type: ignore[override]
        return self.memory_cfg.routed

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        output, inputs = super().step_output(hidden, prepared), prepared.tensors["inputs"]
        if self.model.banks:
            per_token = self.model.flops(inputs.shape[1]).training_per_token
            of_bank = prepared.host["share"] * self.model.bank_flops().training_per_token
            output.flops = per_token * inputs.numel() + of_bank
        told = hidden.extra
        if "load" not in told:
            return output
        output.terms |= self._router_losses(told, len(inputs), prepared.host["alone"])
        decisions = told["decided"].sum()
        output.metrics["router_entropy"] = Metric(told["entropy"].sum(), decisions)
        output.metrics["chapters"] = Metric(told["load"], figures=chapter_figures)
        return output

    def _router_losses(self, told: dict[str, Tensor], rows: int, alone: bool) -> dict[str, LossTerm]:
        """Those that are switched on, of the decisions of all processes in a micro-batch: of their loads and of their
        importance shares are made, which are no sums. This one has the gradient of its own decisions, and its rows'
        part of the value."""
        if not self._losses:
            return {}
        importance = told["importance"]  # (R, C)
        columns = (
            told["load"],
            importance,
            told["squares"][:, None],
            torch.full_like(importance[:, :1], rows),
        )
        own = torch.cat([column.to(importance.dtype) for column in columns], 1)  # (R, 2 C + 2)
        seen = own.detach()
        every = own if alone else own + (self.add_up(seen) - seen)
        load, importance, squares, of_rows = every.split([*importance.shape[1:] * 2, 1, 1], 1)
        losses = {
            "load_balance": balance(load, importance),
            "aux": auxiliary(importance),
            "z": squared_normaliser(squares[:, 0], importance),
        }
        found = {}
        for name, weight in self._losses.items():
            loss = losses[name].mean()
            value = loss.detach()
            total = rows * value + of_rows[0, 0] * (loss - value)
            found[name] = LossTerm(total, "rows", weight, likelihood=False)
        return found

    def annotate(self, text: str | bytes) -> Annotation:
        """The chapters that each token reads in every layer that chooses, the likeliest first."""
        if not self.memory_cfg.routed:
            return Annotation()
        ctx = Context(seed=0, step=0, phase="eval", rows_in_step=1)
        hidden = self.hidden(self.prepare(self.one_row(text), ctx).to(self.device))
        shared = self.memory_cfg.num_shared_chapters
        chosen = (hidden.extra["chosen"][:, 0, 1:] + shared).tolist()  # (R, L, K)
        return Annotation(
            tuple(
                Spans.by_token(f"layer {layer}: chapters", [" ".join(map(str, c)) for c in of_layer])
                for layer, of_layer in zip(self.memory_cfg.memory_layers, chosen, strict=True)
            )
        )


def openings(doc_ids: Tensor, weights: Tensor) -> Tensor:
    """Of each token (B, S): how many tokens of its document stand before the first target that counts; more than a row
    has where none does. `weights` (B, S) of targets, which are the tokens behind."""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand(doc_ids.shape)
    first = index - document_positions(doc_ids)
    never = torch.full_like(index, doc_ids.shape[1])
    counts = torch.where(weights > 0, index, never)
    found = never.scatter_reduce(1, first, counts, "amin").gather(1, first)
    return torch.where(found < never, found + 1 - first, never + 1)


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


class PretrainedAdapter(MemoryModelAdapter):
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
        base = (
            f"base {cfg.base_model_name} ({self.model.config.model_type}, {sizes.n_layers} layers of width "
            f"{sizes.d_model}, {how})"
        )
        memory = self.memory_cfg
        if memory.without:
            return (base,)
        layers = ", ".join(map(str, memory.memory_layers))
        return base, f"a memory of {memory.num_memory_tokens:,} tokens, read by its layers {layers}"
