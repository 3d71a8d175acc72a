"""Next-byte prediction for models that cut text into chunks as they read it: the loss that keeps chunks as long as they
are aimed to be, and what is reported of them.

Shapes: B rows, S stages that cut chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapters.annotation import Annotation, Span, Spans
from adapters.base import Context, LossTerm, Metric, Prepared, StepOutput
from adapters.default import DefaultModelAdapter
from models.hierarchy.routing import ratio_loss
from models.layers.decoder import Hidden

if TYPE_CHECKING:
    from data.rows import Batch

__all__ = ["HierarchyAdapter"]


class HierarchyAdapter(DefaultModelAdapter):
    """A term `ratio` beside that of its base: of each row, the sum over the stages of `ratio_loss`, weighted by
    `ratio_loss_weight` (Hwang et al. 2025, arXiv:2507.07955, equations 10 and 11). The paper takes F and G over the
    micro-batch (`ratio_over: batch`), on which results then depend."""

    no_masks = "the lengths of chunks are learned from all bytes of a row, those of padding too"
    # How many chunks there are, once for each stage.
    host_syncs = ("_local_scalar_dense", "_to_copy")

    @property
    def console_metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"bytes_per_chunk_{stage + 1}" for stage in range(len(self.model_cfg.ratios)))

    @property
    def depends_on_split(self) -> str:
        if self.model_cfg.chunking == "dynamic" and self.model_cfg.ratio_over == "batch":
            return "the ratio loss is that of a micro-batch of a process (model_cfg.ratio_over=row is not)"
        return super().depends_on_split

    @property
    def notes(self) -> tuple[str, ...]:
        rates = ", ".join(f"{rate:.3f}" for rate in self.model_cfg.lr_multipliers)
        found = (
            *super().notes,
            f"learning rates of its stages, from the outermost in: {rates} times the run's",
        )
        if self.model_cfg.chunking == "fixed":
            return (*found, "H-Net (pool): chunks of one length, a baseline; it learns no boundaries")
        return found

    @property
    def width(self) -> int:
        """That of the innermost stage, for all: between stages rates differ by `lr_multiplier` alone."""
        return self.model_cfg.widths[-1]

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        """Also the denominator `rows`."""
        prepared = super().prepare(batch, ctx)
        prepared.denominators["rows"] = float(len(batch.rows))
        return prepared

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        output, told = super().step_output(hidden, prepared), hidden.extra
        rows, length = prepared.tensors["inputs"].shape
        output.metrics |= self._figures(told, rows * length)
        output.flops = self._operations(told, length)
        if self.model_cfg.chunking == "fixed":
            return output
        losses = self._ratio_losses(told)  # (S,)
        output.terms["ratio"] = LossTerm(
            losses.sum(), "rows", self.model_cfg.ratio_loss_weight, likelihood=False
        )
        for stage, loss in enumerate(losses.detach(), 1):
            output.metrics[f"ratio_loss_{stage}"] = Metric(loss, rows)
        return output

    def _ratio_losses(self, told: dict[str, Tensor]) -> Tensor:
        """(S,): of each stage, summed over rows."""
        opened, probability, places = told["opened"], told["probability"], told["places"]  # (S, B)
        rows = opened.shape[1]
        if self.model_cfg.ratio_over == "batch":
            opened, probability, places = (t.sum(1, keepdim=True) for t in (opened, probability, places))
        ratios = self.model_cfg.ratios
        losses = [
            ratio_loss(part, mean, ratio)
            for part, mean, ratio in zip(opened / places, probability / places, ratios, strict=True)
        ]
        return torch.stack(losses).mean(1) * rows

    def _figures(self, told: dict[str, Tensor], count: int) -> dict[str, Metric]:
        """Of each stage: `boundary_share`, F; `boundary_probability`, G; `probability_at_boundaries`; and
        `bytes_per_chunk`."""
        found: dict[str, Metric] = {}
        for stage in range(len(told["opened"])):
            opened, probability, at, places = (
                told[name][stage].detach().sum()
                for name in ("opened", "probability", "probability_opened", "places")
            )
            found |= {
                f"boundary_share_{stage + 1}": Metric(opened, places),
                f"boundary_probability_{stage + 1}": Metric(probability, places),
                f"probability_at_boundaries_{stage + 1}": Metric(at, opened),
                f"bytes_per_chunk_{stage + 1}": Metric(count, opened),
            }
        return found

    def _operations(self, told: dict[str, Tensor], length: int) -> Tensor:
        """Of training, (): as the formula counts them, at the chunks that each row had. One that is too short for any
        counts as one with one: an empty place is computed for it."""
        lengths = [length, *told["opened"].detach().clamp(min=1)]
        return self.model.flops_of(lengths, length).training_per_token.sum() * length

    def annotate(self, text: str | bytes) -> Annotation:
        """The chunks of each stage, in bytes."""
        ctx = Context(seed=0, step=0, phase="eval", rows_in_step=1)
        prepared = self.prepare(self.one_row(text), ctx).to(self.device)
        found = []
        for stage, begins in enumerate(self.hidden(prepared).extra["boundaries"][:, 0, 1:].tolist(), 1):
            # What comes before the first boundary in the text is of the chunk that its start token opened.
            starts = [place for place, opens in enumerate(begins) if opens or place == 0]
            ends = [*starts[1:], len(begins)]
            chunks = tuple(Span(start, end) for start, end in zip(starts, ends, strict=False))
            found.append(Spans(f"stage {stage}: chunks that the model cut", chunks))
        return Annotation(tuple(found))

    def heldout_metrics(self, hidden: Hidden, prepared: Prepared) -> dict[str, Metric]:
        found = self._figures(hidden.extra, prepared.tensors["inputs"].numel())
        return super().heldout_metrics(hidden, prepared) | found
