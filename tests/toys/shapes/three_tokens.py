"""The next three tokens at once: two more heads, which teach the network and are not asked for text or a score.

Shapes: V_p padded vocabulary, D width.
"""

from dataclasses import replace

from torch import nn

from adapters.base import DataSpec, Prepared, StepOutput
from adapters.default import DefaultModelAdapter
from configs.schema import Free, NonNegativeFloat
from models.layers.decoder import Hidden
from models.layers.flops import Flops, matmul_flops
from models.layers.roles import Rule
from models.vanilla import Vanilla, VanillaConfig

LATER = (2, 3)  # which tokens behind each position, beside the next


class Config(VanillaConfig):
    later_weight: Free[NonNegativeFloat] = 0.3


class ThreeTokens(Vanilla):
    Config = Config

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        rows = len(self.embedding_weight)
        self.later = nn.ModuleDict(
            {str(k): nn.Linear(cfg.d_model, rows, bias=False) for k in LATER}
        )  # (V_p, D)

    def param_roles(self) -> list[Rule]:
        return [Rule(r"later\.\d\.weight", "head"), *super().param_roles()]

    def flops(self, seq_len: int) -> Flops:
        """The further heads multiply in training only."""
        heads = matmul_flops(sum(p.numel() for p in self.later.parameters()))
        return super().flops(seq_len) + replace(heads, forward_per_token=0.0)


class ThreeTokensAdapter(DefaultModelAdapter):
    def data_spec(self) -> DataSpec:
        return DataSpec(lookahead=max(LATER))

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        output = super().step_output(hidden, prepared)
        for k in LATER:
            head = self.model.later[str(k)].weight
            output.terms[f"token_{k}"] = self.cross_entropy(
                hidden.states, prepared, k, self.model_cfg.later_weight, head
            )
        return output
