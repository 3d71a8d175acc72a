"""Several tokens ahead at once: the next one, which text and scores are made of, and further ones that teach.

For models that run further heads or modules where they are given the tokens ahead (models/mtp.py, models/mtm.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from adapters.base import Context, DataSpec, Prepared, StepOutput
from adapters.default import as_hidden, nth
from adapters.documents import documents_among
from adapters.experts import ExpertsAdapter
from models.layers.decoder import Hidden, further
from models.mtm import MTM

if TYPE_CHECKING:
    from data.rows import Batch
    from data.tokenizers import Tokenizer

__all__ = ["MultiTokenAdapter"]


class MultiTokenAdapter(ExpertsAdapter):
    """Loss terms `ce`, and `head_2` to `head_n` of the k-th token after each position, each a mean over the positions
    that have such a token in their document, and weighed by the Config's `loss_weights`. A weight of 0 skips nothing.

    Logits of one head exist at a time. Experts of modules are balanced with those of the trunk.
    """

    done = 0.0  # share of the training behind this step

    def __init__(self, model: nn.Module, model_cfg: Any, tokenizer: Tokenizer) -> None:
        super().__init__(model, model_cfg, tokenizer)
        if not self.layers:
            self.console_metrics = ()

    @classmethod
    def masks(cls, model_cfg: Any) -> str:
        """Where the trunk has no experts it is the default objective."""
        return super().masks(model_cfg) if getattr(model_cfg, "trunk", "") == "moe" else ""

    @classmethod
    def build_model(cls, model_class: Any, model_cfg: Any) -> nn.Module:
        """`mtp` with `use_deepseek_mtp` is the model of `mtm`."""
        if getattr(model_cfg, "use_deepseek_mtp", False):
            return MTM(model_cfg.deepseek)
        return model_class(model_cfg)

    @property
    def experts_cfg(self) -> Any:
        return self.model.trunk.cfg

    def data_spec(self) -> DataSpec:
        return DataSpec(lookahead=self.model_cfg.tokens_ahead)

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        prepared = super().prepare(batch, ctx)
        prepared.host["further"] = self.model_cfg.tokens_ahead - 1 if ctx.phase == "train" else 0
        return prepared

    def on_step_start(self, ctx: Context, total_steps: int) -> None:
        super().on_step_start(ctx, total_steps)
        self.done = ctx.step / total_steps

    def hidden(self, prepared: Prepared) -> Hidden:
        t = prepared.tensors
        ahead = [t[nth("targets", k)] for k in range(1, 1 + prepared.host["further"])]
        return as_hidden(self.model(t["inputs"], **documents_among(t), **self.drawn(prepared), ahead=ahead))

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        output = super().step_output(hidden, prepared)
        first, *others = self.model_cfg.loss_weights(self.done)
        output.terms["ce"].weight = first
        for k, weight in enumerate(others, 2):
            output.terms[further(k)] = self.cross_entropy(hidden.extra[further(k)], prepared, k, weight)
        return output
