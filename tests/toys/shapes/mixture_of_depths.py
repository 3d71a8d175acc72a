"""Half of the tokens pass a block; the others go around it.

Training picks the better half of each row, which takes the whole row to know. Text and scores must not look ahead:
there every token decides for itself, by a score that a loss of its own has taught to foretell the choice.

Shapes: B rows, T new tokens, S all tokens, K = T // 2 chosen ones, D width, R routed blocks (every second one).
"""

from dataclasses import replace
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from adapters.base import Context, LossTerm, Metric, Prepared, StepOutput
from adapters.default import DefaultModelAdapter
from configs.schema import Free, NonNegativeFloat
from kernels.attention import Visible
from models.layers.cache import KVCache, StateCache
from models.layers.decoder import Hidden
from models.layers.flops import Flops, matmul_flops
from models.layers.roles import Rule
from models.vanilla import Block, Vanilla, VanillaConfig, block_flops


class Config(VanillaConfig):
    n_layers: Annotated[int, Field(ge=2)] = 2
    router_weight: Free[NonNegativeFloat] = 0.1


class RoutedBlock(Block):
    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__(cfg, layer)
        self.router = nn.Linear(cfg.d_model, 1, bias=False)

    def forward(self, x, plan_of, visible, rotation, cache=None, before: Tensor | None = None):
        """x (B, T, D), the scores and who passed (B, T). `plan_of` what is `visible`, for attention. `before`: who has
        passed, (B, S - T); None: choose half."""
        score = self.router(x).squeeze(-1)
        if before is None:
            chosen = score.topk(max(1, x.shape[1] // 2), dim=1).indices.sort(dim=1).values  # (B, K)
            passed = torch.zeros_like(score).scatter(1, chosen, 1.0)
            rows = torch.arange(len(x), device=x.device)[:, None]  # (B, 1)
            among = Visible.causally(chosen, doc_ids=visible.doc_ids[rows, chosen])  # (B, K)
            part, rotation = x[rows, chosen], rotation and [table[chosen] for table in rotation]  # (B, K, D)
            gate = score.gather(1, chosen).sigmoid()[..., None]  # (B, K, 1)
            added = gate * (super().forward(part, plan_of(among), rotation) - part)
            return x.scatter_add(1, chosen[..., None].expand_as(added), added), score, passed
        passed = (score > 0).to(score.dtype)
        seen = may_see(torch.cat((before, passed), dim=1), x.shape[1])
        y = super().forward(x, plan_of(replace(visible, mask=seen)), rotation, cache)
        return x + (passed * score.sigmoid())[..., None] * (y - x), score, passed


def may_see(passed: Tensor, queries: int) -> Tensor:
    """(B, 1, T, S): a token sees itself, and earlier ones that have passed."""
    key = torch.arange(passed.shape[1], device=passed.device)
    query = key[-queries:, None]
    return (key == query) | (key < query) & (passed[:, None, None] > 0)


class MixtureOfDepths(Vanilla):
    Config = Config

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        for i in range(1, cfg.n_layers, 2):
            self.layers[i] = RoutedBlock(cfg, i)

    def forward(self, tokens, doc_ids=None, cache=None, choose: bool = False) -> Hidden:
        x, (plan, rotation) = self.embed(tokens, doc_ids, cache)
        plan_of = partial(self.plan, dtype=plan.options.dtype)
        keys = None if cache is None else cache["keys"]
        scores, passed = [], []
        for i, block in enumerate(self.layers):
            if i % 2 == 0:
                x = block(x, plan, rotation, keys)
                continue
            before = None if choose else x.new_empty(len(x), 0) if cache is None else cache[f"passed_{i}"]
            x, *routed = block(x, plan_of, plan.visible, rotation, keys, before)
            scores.append(routed[0])
            passed.append(routed[1])
            if cache is not None:
                cache[f"passed_{i}"] = torch.cat((before, routed[1]), dim=1)
        if cache is not None:
            keys.advance(tokens.shape[1])
            cache.advance(tokens.shape[1])
        extra = {"score": torch.stack(scores), "passed": torch.stack(passed)}  # (R, B, T)
        return Hidden(self.norm(x), extra)

    def init_cache(self, rows: int) -> StateCache:
        """The keys of all tokens, and which of them a routed block may see."""
        none = {f"passed_{i}": self.norm.weight.new_empty(rows, 0) for i in range(1, self.cfg.n_layers, 2)}
        return StateCache(keys=KVCache(self.cfg.n_layers, rows), **none)

    def param_roles(self) -> list[Rule]:
        return [Rule(r"layers\.\d+\.router\.weight", "router"), *super().param_roles()]

    def flops(self, seq_len: int) -> Flops:
        """Of training; scores and text compute a routed block for every token, and drop what did not pass."""
        c, routed, half = self.cfg, self.cfg.n_layers // 2, max(1, seq_len // 2)
        plain = block_flops(c, seq_len) * (c.n_layers - routed)
        passed = block_flops(c, half) * (routed * half / seq_len)
        return plain + passed + matmul_flops(routed * c.d_model + self.head_weight.numel())


class MixtureOfDepthsAdapter(DefaultModelAdapter):
    console_metrics = ("foretold",)

    def prepare(self, batch, ctx: Context) -> Prepared:
        prepared = super().prepare(batch, ctx)
        prepared.denominators["positions"] = float(batch.weights.size)
        prepared.host["choose"] = ctx.phase == "train"
        return prepared

    def hidden(self, prepared: Prepared) -> Hidden:
        t = prepared.tensors
        return self.model(t["inputs"], doc_ids=t["doc_ids"], choose=prepared.host["choose"])

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        output = super().step_output(hidden, prepared)
        score, passed = hidden.extra["score"], hidden.extra["passed"]
        wrong = F.binary_cross_entropy_with_logits(score, passed, reduction="sum") / len(score)
        output.terms["router"] = LossTerm(wrong, "positions", self.model_cfg.router_weight, likelihood=False)
        output.metrics["foretold"] = Metric(((score > 0) == (passed > 0)).sum(), passed.numel())
        return output

    def heldout_metrics(self, hidden: Hidden, prepared: Prepared) -> dict[str, Metric]:
        passed = hidden.extra["passed"]
        return {"passed": Metric(passed.sum(), passed.numel())}
