"""Next-token prediction of `current_best_gpt`: further tokens and prefixes as targets of the same logits, and what
changes over the run.

Shapes: B rows, S positions, n targets of each, V vocabulary.
"""

from __future__ import annotations

from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from adapters.base import Context, DataSpec, LossTerm, Prepared, StepOutput
from adapters.default import DefaultModelAdapter, nth
from kernels.linear_cross_entropy import IGNORED
from models.current_best.stages import prefix_weight, stage_at, target_weights
from models.layers.decoder import Hidden

if TYPE_CHECKING:
    from data.rows import Batch
    from data.tokenizers import Tokenizer

__all__ = ["CurrentBestAdapter", "prefixes"]


class CurrentBestAdapter(DefaultModelAdapter):
    """Loss terms: `ce`, the next token's, whose gradient is that of all targets; beside it, weighing nothing, what the
    others are: `future`, each of the tokens behind it times its weight, and `prefix`."""

    fitted = MappingProxyType({"frequencies": "run", "score_scale": "run"})
    done = 0.0  # share of the run behind this step

    def data_spec(self) -> DataSpec:
        return DataSpec(lookahead=len(self.model_cfg.of("mtp_weights")))

    @property
    def notes(self) -> tuple[str, ...]:
        return self.model.notes

    @property
    def cost_changes(self) -> tuple[float, ...]:
        """Where windows grow that are not cut to the context before and after."""
        cfg = self.model_cfg
        seen = [() if cfg.dense else (cfg.window(s.short), cfg.window(s.long)) for s in cfg.stages]
        return tuple(
            s.start for s, old, new in zip(cfg.stages[1:], seen, seen[1:], strict=False) if new != old
        )

    @cached_property
    def prefix_table(self) -> Tensor:
        """(V,) int64, on the CPU."""
        return torch.from_numpy(prefixes(self.tokenizer))

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        """As the base; where targets may lie behind a document's end, its end does not keep them from counting. Also
        `prefix_targets` (B, S), `IGNORED` where a target has no prefix, in training."""
        prepared = super().prepare(batch, ctx)
        t = prepared.tensors
        if not self.model_cfg.mask_shifts_at_docs:
            for k in range(2, self.data_spec().lookahead + 1):
                t[nth("weights", k)] = t["weights"]
                prepared.denominators[nth("tokens", k)] = prepared.denominators["tokens"]
        if ctx.phase == "train" and self.model_cfg.of("prefix_weights"):
            t["prefix_targets"] = self.prefix_table[t["targets"]]
        return prepared

    def on_step_start(self, ctx: Context, total_steps: int) -> None:
        super().on_step_start(ctx, total_steps)
        cfg, self.done = self.model_cfg, ctx.step / total_steps
        stage = len(cfg.stages) - 1 if ctx.of_draws == "most" else stage_at(cfg.stages, self.done)
        if stage != self.stage:
            self.model.set_stage(stage)
            self.stage = stage
        # Gradients of one step of Adam are all tied, or none is.
        pair = ctx.step - ctx.step % cfg.of("adam_every")
        self.model.tied = pair / total_steps < cfg.of("tie_until") and not self.model.parted

    stage: int | None = None  # None: what the model was built or loaded with is not known

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        cfg, t = self.model_cfg, prepared.tensors
        weights = target_weights(cfg.of("mtp_weights"), self.done)
        targets = [t[nth("targets", k)] for k in range(1, len(weights) + 1)]
        weighs = [w * t[nth("weights", k)] for k, w in enumerate(weights, 1)]
        if "prefix_targets" in t:
            targets.append(t["prefix_targets"])
            weighs.append(prefix_weight(cfg.of("prefix_weights"), self.done) * t["weights"])
        weight = torch.stack(weighs, -1)  # (B, S, n)
        total, nats, z = self.head_loss(
            hidden.states,
            torch.stack(targets, -1),
            weight,
            hidden.extra.get("head"),
            self.z_loss,
            padding=cfg.pad_in_loss,
        )
        each = (nats * weight).sum((0, 1))  # (n,)
        gradient = total - total.detach()  # 0, with the gradient of all
        term = LossTerm(each[0] + gradient, "tokens")
        if z is not None:
            term.z_loss = self.z_loss * (z * weight.sum(-1)).sum()
        terms = {"ce": term}
        further = len(weights)
        if further > 1:
            terms["future"] = LossTerm(each[1:further].sum(), "tokens", weight=0.0, likelihood=False)
        if "prefix_targets" in t:
            terms["prefix"] = LossTerm(each[further], "tokens", weight=0.0, likelihood=False)
        return StepOutput(terms)


def prefixes(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) int64: the longest token whose bytes begin those of each token and are fewer, `IGNORED` where there is
    none."""
    found = np.full(tokenizer.vocab_size, IGNORED, dtype=np.int64)
    lengths = tokenizer.token_bytes
    if lengths.max() < 2:
        return found
    spelled = {token: tokenizer.decode([token]) for token in np.flatnonzero(lengths).tolist()}
    tokens = {text: token for token, text in reversed(spelled.items())}
    for token, text in spelled.items():
        for end in range(len(text) - 1, 0, -1):
            if text[:end] in tokens:
                found[token] = tokens[text[:end]]
                break
    return found
