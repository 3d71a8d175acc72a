"""Next-token prediction by a network that iterates: how often is drawn once per step, from (seed, step) alone, so that
it is the same in every micro-batch and process, after a resume, and where activations are recomputed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from adapters.base import Annotation, Context, Metric, Prepared, Spans, StepOutput
from adapters.default import DefaultModelAdapter
from adapters.randomness import Noise
from models.layers.decoder import Hidden
from models.rd import states_after

if TYPE_CHECKING:
    from data.rows import Batch

__all__ = ["RecurrentDepthAdapter"]

ALSO_AFTER = (1, 4, 8, 16, 32)  # recurrences that the command `eval` scores beside its own


class RecurrentDepthAdapter(DefaultModelAdapter):
    """The score is that after `eval_recurrence` iterations, from noise that depends on the position alone, whatever the
    seed: rows are independent, and scores and text are of one model."""

    console_metrics = ("recurrences",)

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        """Also the host's `recurrences`, `retained` and `also_after`, and in training `seeds` of the state's
        noise, (B,) int64."""
        prepared = super().prepare(batch, ctx)
        prepared.host |= {"recurrences": self.recurrences(ctx), "retained": None, "also_after": ()}
        if ctx.phase == "train":
            noise = Noise(ctx.seed, ctx.step, ctx.phase, batch.rows)
            prepared.tensors["seeds"] = noise.seeds("state")
            prepared.host["retained"] = self.model_cfg.k_trunc
        else:
            prepared.host["also_after"] = ALSO_AFTER if ctx.estimates else ()
        return prepared

    def recurrences(self, ctx: Context) -> int:
        """Of all rows of a step."""
        c = self.model_cfg
        if ctx.phase == "eval":
            return c.eval_depth
        if ctx.of_draws == "mean":
            return c.depth_law.typical(c.k_trunc)
        if ctx.of_draws == "most":
            return c.depth_law.deepest(c.k_trunc)  # more iterations take no more memory
        return int(
            c.depth_law.draw(Noise(ctx.seed, ctx.step, ctx.phase, np.zeros(1)).uniform("recurrences", 2))
        )

    def drawn(self, prepared: Prepared) -> dict[str, Any]:
        of_host = {name: prepared.host[name] for name in ("recurrences", "retained", "also_after")}
        return super().drawn(prepared) | of_host | {"seeds": prepared.tensors.get("seeds")}

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        output = super().step_output(hidden, prepared)
        recurrences, inputs = prepared.host["recurrences"], prepared.tensors["inputs"]
        output.metrics |= {**self.heldout_metrics(hidden, prepared), "recurrences": Metric(recurrences)}
        output.flops = self.model.flops(inputs.shape[1], recurrences).training_per_token * inputs.numel()
        return output

    def other_nats(self, hidden: Hidden, prepared: Prepared) -> dict[str, Tensor]:
        found = {}
        for r in prepared.host["also_after"]:
            states = hidden.extra[states_after(r)]
            _, nats, _ = self.head_loss(states, prepared.tensors["targets"], None)
            found[f"at {r} recurrence{'s' if r > 1 else ''}"] = nats
        return found

    def heldout_metrics(self, hidden: Hidden, prepared: Prepared) -> dict[str, Metric]:
        """`state_change`: of a state by the last iteration, in units of its length; near 0 where more of them would
        change nothing. Where tokens may leave before that, `exits` instead. `recurrences`: that tokens took."""
        weights = prepared.tensors["weights"]
        if "change" not in hidden.extra:
            return self.exits(hidden, weights)
        changed = (hidden.extra["change"] * weights).sum()
        return {
            "recurrences": Metric(prepared.host["recurrences"]),
            "state_change": Metric(changed, weights.sum()),
        }

    def text_metrics(self, hidden: Hidden) -> dict[str, Metric]:
        return self.exits(hidden, hidden.states.new_ones(hidden.states.shape[:2]))

    def exits(self, hidden: Hidden, weights: Tensor) -> dict[str, Metric]:
        """`recurrences` that tokens took, and the share of those that took all, `full_depth`; by weights (B, T)."""
        if "recurrences" not in hidden.extra:
            return {}
        took, count = hidden.extra["recurrences"], weights.sum()
        full = took == self.model_cfg.eval_depth
        return {
            "recurrences": Metric((took * weights).sum(), count),
            "full_depth": Metric((full * weights).sum(), count),
        }

    def annotate(self, text: str | bytes) -> Annotation:
        """How many recurrences each token took, where tokens may leave."""
        if self.model_cfg.exit_criterion == "none":
            return Annotation()
        ctx = Context(seed=0, step=0, phase="eval", rows_in_step=1)
        hidden = self.hidden(self.prepare(self.one_row(text), ctx).to(self.device))
        took = hidden.extra["recurrences"][0, 1:].tolist()  # (L,)
        return Annotation((Spans.by_token("recurrences", [str(int(turns)) for turns in took]),))
