"""Next-token prediction where a block's router picks tokens: the choice in training, what foretells it elsewhere.

The best of a row are known at its end alone, so that the loss of training has seen the future and is no likelihood.
Scores and text let every token decide for itself; the loss under the choice is reported beside the score.

Shapes: B rows, S positions, R routed blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.base import Annotation, Context, LossTerm, Metric, Prepared, Spans, StepOutput
from adapters.default import DefaultModelAdapter
from adapters.randomness import Noise
from models.layers.decoder import Hidden

if TYPE_CHECKING:
    from data.rows import Batch

__all__ = ["MixtureOfDepthsAdapter"]


class MixtureOfDepthsAdapter(DefaultModelAdapter):
    """Terms: `ce_topk`, which is no likelihood, and `bce`, of the logits of entering against the choice, a mean over
    routed blocks, where these are learned. Metrics of training: `largest_router_score`, the greatest magnitude of
    one; `foretold_share`, of tokens that would enter of themselves; `routing_accuracy_<layer>`, of positions where
    that is the choice.

    Of held-out text: `used_share`, of tokens that entered a routed block; `ce_topk`, nats per token of the same text
    under the choice, which takes a second pass, and `routing_accuracy_<layer>` in it. Of text: `used_share`.
    """

    no_masks = "all tokens of a row compete for its blocks, those of padding too"
    console_metrics = ("foretold_share",)

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        """Also the denominator `positions`, `choose` for the host, and in training `row_seeds` (B,) int64 of a random
        router: in evaluation its scores are the same for all rows, as in text, so that a score depends on the text
        alone. For the host of an evaluation `lengths`: of each row up to the last target that counts."""
        prepared = super().prepare(batch, ctx)
        training = ctx.phase == "train"
        prepared.denominators["positions"] = float(batch.weights.size)
        prepared.host["choose"] = training
        if not training:
            counted = batch.weights[:, ::-1] > 0
            prepared.host["lengths"] = (counted.shape[1] - counted.argmax(axis=1)).tolist()
        elif self.model_cfg.router_type == "random":
            noise = Noise(ctx.seed, ctx.step, ctx.phase, batch.rows)
            prepared.tensors["row_seeds"] = noise.seeds("router")
        return prepared

    def drawn(self, prepared: Prepared) -> dict[str, Any]:
        seeds = prepared.tensors.get("row_seeds")
        return super().drawn(prepared) | {"choose": prepared.host["choose"], "row_seeds": seeds}

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        told = hidden.extra
        ce = replace(self.cross_entropy(hidden.states, prepared), likelihood=False)
        output = StepOutput({"ce_topk": ce})
        chosen, logit = told["chosen"], told["logit"]  # (R, B, S)
        if self.model_cfg.router_type == "learned":
            wrong = F.binary_cross_entropy_with_logits(logit, chosen.to(logit.dtype), reduction="sum")
            weight = self.model_cfg.mod_bce_weight
            output.terms["bce"] = LossTerm(wrong / len(logit), "positions", weight, likelihood=False)
        output.metrics["largest_router_score"] = Metric(told["score"].detach().abs().max(), reduce="max")
        output.metrics["foretold_share"] = _share(logit > 0)
        output.metrics |= self._accuracies(told, torch.ones_like(chosen[0]))
        return output

    def _accuracies(self, told: dict[str, Tensor], counted: Tensor) -> dict[str, Metric]:
        """Over the positions that are `counted`, (B, S) bool."""
        right = (told["logit"] > 0) == told["chosen"]  # (R, B, S)
        return {
            f"routing_accuracy_{layer}": _share(of_layer, counted)
            for layer, of_layer in zip(self.model_cfg.routed_layers, right, strict=True)
        }

    def heldout_metrics(self, hidden: Hidden, prepared: Prepared) -> dict[str, Metric]:
        metrics = {"used_share": _share(hidden.extra["entered"], prepared.tensors["weights"] > 0)}
        for part in self._unpadded(prepared):
            t, choosing = part.tensors, self.hidden(part)
            total, _, _ = self.head_loss(choosing.states, t["targets"], t["weights"])
            more = {"ce_topk": Metric(total, t["weights"].sum())}
            more |= self._accuracies(choosing.extra, t["weights"] > 0)
            for name, metric in more.items():
                before = metrics.get(name, Metric(0.0, 0.0))
                metrics[name] = Metric(before.sum + metric.sum, before.count + metric.count)
        return metrics

    def _unpadded(self, prepared: Prepared) -> Iterator[Prepared]:
        """Rows of one length at a time, to be read under the choice: padding, of which a batch has more or less, would
        raise the number that is chosen, and be chosen."""
        lengths, host = np.array(prepared.host["lengths"]), {**prepared.host, "choose": True}
        if (lengths == prepared.tensors["weights"].shape[1]).all():
            yield replace(prepared, host=host)
            return
        for length in np.unique(lengths).tolist():
            rows = torch.from_numpy(np.flatnonzero(lengths == length)).to(self.device)
            names = ("inputs", "doc_ids", "targets", "weights")
            yield Prepared({name: prepared.tensors[name][rows, :length] for name in names}, {}, host)

    def annotate(self, text: str | bytes) -> Annotation:
        """The tokens that enter each routed block."""
        ctx = Context(seed=0, step=0, phase="eval", rows_in_step=1)
        hidden = self.hidden(self.prepare(self.one_row(text), ctx).to(self.device))
        entered = hidden.extra["entered"][:, 0, 1:].tolist()  # (R, L)
        return Annotation(
            tuple(
                Spans.by_token(f"layer {layer}: tokens that enter", ["" if e else None for e in of_layer])
                for layer, of_layer in zip(self.model_cfg.routed_layers, entered, strict=True)
            )
        )

    def text_metrics(self, hidden: Hidden) -> dict[str, Metric]:
        return {"used_share": _share(hidden.extra["entered"])}


def _share(true: Tensor, counted: Tensor | None = None) -> Metric:
    """Of (..., B, S) bool; `counted` (B, S) bool: of these positions alone."""
    if counted is None:
        return Metric(true.sum(), true.numel())
    return Metric((true & counted).sum(), counted.sum() * (true.numel() // counted.numel()))
