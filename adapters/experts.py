"""Next-token prediction for models some of whose layers are experts: losses that keep them equally busy, counts of a
step over all processes, and the bias that is moved by these.

Without such layers it is the default adapter, so that an objective of its own may start from it for any model.

Shapes: B rows, L layers with experts, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapters.base import Annotation, Context, LossTerm, Map, Metric, Prepared, Spans, StepOutput
from adapters.default import DefaultModelAdapter
from adapters.randomness import Noise
from models.layers.decoder import Hidden
from models.layers.experts import BiasedGate, Choice, ExpertLayer, expert_layers

if TYPE_CHECKING:
    from data.rows import Batch
    from models.moe import MoEConfig

__all__ = ["ExpertsAdapter", "load_figures"]

# What layers tell (`ExpertLayer.statistics`) -> what it is divided by, and the field that weighs it.
LOSSES = {
    "balance": ("rows", "alpha"),
    "sequence_balance": ("rows", "seq_aux_alpha"),
    "router_z": ("positions", "beta"),
}


class ExpertsAdapter(DefaultModelAdapter):
    """Terms beside those of its base: `LOSSES`, weighted as they are minimised; metrics of the same names, means over
    layers without weights; `load_figures`; and `dropped_assignments`, of which there are none."""

    no_masks = "experts are balanced over all tokens of a row, those of padding too"
    console_metrics: tuple[str, ...] = ("load_max_over_mean",)
    load: Tensor | None = None  # assignments of this step's micro-batches here, (L, E) int64
    frozen = False  # whether biases stay as they are in this step

    @property
    def experts_cfg(self) -> MoEConfig:
        """The Config of the layers with experts."""
        return self.model_cfg

    @property
    def layers(self) -> list[ExpertLayer]:
        return list(expert_layers(self.model))

    @property
    def depends_on_split(self) -> str:
        if self.layers and self.experts_cfg.balance_over == "micro_batch":
            return "the balance of experts is that of a micro-batch of a process (model_cfg.balance_over=row is not)"
        return super().depends_on_split

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        """Also the denominators `rows` and `positions`, and `row_seeds` (B,) int64 where gates are jittered."""
        prepared = super().prepare(batch, ctx)
        if not self.layers:
            return prepared
        prepared.denominators |= {"rows": float(len(batch.rows)), "positions": float(batch.weights.size)}
        if ctx.phase == "train" and self.experts_cfg.jitter_noise:
            noise = Noise(ctx.seed, ctx.step, ctx.phase, batch.rows)
            prepared.tensors["row_seeds"] = noise.seeds("router")
        return prepared

    def drawn(self, prepared: Prepared) -> dict[str, Any]:
        seeds = prepared.tensors.get("row_seeds")
        return super().drawn(prepared) | ({} if seeds is None else {"row_seeds": seeds})

    def on_step_start(self, ctx: Context, total_steps: int) -> None:
        super().on_step_start(ctx, total_steps)
        self.load = None
        if self.layers:
            self.frozen = ctx.step >= (1 - self.experts_cfg.bias_freeze_frac) * total_steps

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        return self.with_experts(super().step_output(hidden, prepared), hidden, prepared)

    def with_experts(self, output: StepOutput, hidden: Hidden, prepared: Prepared) -> StepOutput:
        """`output` with what the experts add to it."""
        if "load" not in hidden.extra:
            return output
        told, inputs = hidden.extra, prepared.tensors["inputs"]
        layers, counted = len(told["load"]), {"rows": len(inputs), "positions": inputs.numel()}
        for name, (denominator, field) in LOSSES.items():
            if name not in told:
                continue
            of_layer = told[name].sum(1)  # (L,)
            weights = self.experts_cfg.weights(field, layers)
            total = torch.stack([w * part for w, part in zip(weights, of_layer, strict=True)]).sum()
            output.terms[name] = LossTerm(total, denominator, likelihood=False)
            output.metrics[name] = Metric(of_layer.detach().mean(), counted[denominator])
        load = told["load"].sum(1)  # (L, E)
        self.load = load if self.load is None else self.load + load
        assigned = counted["positions"] * self.experts_cfg.chosen * layers
        output.metrics["dropped_assignments"] = Metric(assigned - load.sum(), reduce="sum")
        output.metrics["load"] = Metric(load, figures=load_figures)
        return output

    def after_step(self, step: int, skipped: Tensor) -> None:
        """By the assignments of all processes, so that the biases of all are the same."""
        super().after_step(step, skipped)
        if self.frozen or self.load is None or not self.experts_cfg.bias_update_speed:
            return
        if gates := [layer.gate for layer in self.layers if isinstance(layer.gate, BiasedGate)]:
            for gate, load in zip(gates, self.add_up(self.load), strict=True):
                gate.balance(load, self.experts_cfg.bias_update_speed, skipped)

    def annotate(self, text: str | bytes) -> Annotation:
        """Of each layer with experts, by block: which of them weighs most in a token, as Jiang et al. 2024 show it
        (figure 8); and the weights of all that it uses, experts by tokens."""
        spans, maps = [], []
        for block, choice in self._choices(self.one_row(text)).items():
            weights = torch.zeros_like(choice.shares, dtype=choice.weights.dtype)  # (1, 1 + L, E)
            weights = weights.scatter(-1, choice.experts, choice.weights)[0, 1:].cpu()  # (L, E)
            experts = tuple(map(str, range(weights.shape[1])))
            most = weights.argmax(1).tolist() if len(weights) else []
            spans.append(
                Spans.by_token(f"layer {block}: expert that weighs most", [experts[e] for e in most])
            )
            if len(weights):
                name = f"layer {block}: weights of experts"
                maps.append(Map(name, weights.T, "expert", "token", row_labels=experts))
        return Annotation(tuple(spans), tuple(maps))

    def _choices(self, batch: Batch) -> dict[int, Choice]:
        """What gates choose for the tokens of a batch, by the number of the block; those of blocks that run."""
        found: dict[int, Choice] = {}
        handles = []
        for block, path in enumerate(self.blocks()):

            def keep(layer: Any, given: Any, output: Any, block: int = block) -> None:
                found[block] = layer.gate.choose(layer.gate.logits(given[0], None))

            layers = expert_layers(self.model.get_submodule(path))
            handles += [layer.register_forward_hook(keep) for layer in layers]
        try:
            self.clean_states(batch, Context(seed=0, step=0, phase="eval", rows_in_step=1))
        finally:
            for handle in handles:
                handle.remove()
        return found


def load_figures(load: Tensor) -> dict[str, float]:
    """Of assignments (L, E): `load_max_over_mean`, of a layer's busiest expert, the mean over layers and the worst, 1
    where all are equally busy; `dead_experts`, of all layers, which no token used; `expert_<e>`, the share of the
    experts of that number over the mean share."""
    busiest = load.amax(1) / load.mean(1)  # (L,)
    shares = load.sum(0) / load.sum(0).mean()  # (E,)
    return {
        "load_max_over_mean": float(busiest.mean()),
        "load_max_over_mean_worst": float(busiest.max()),
        "dead_experts": float((load == 0).sum()),
        **{f"expert_{e}": float(share) for e, share in enumerate(shares)},
    }
