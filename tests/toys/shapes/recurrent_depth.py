"""The same blocks over and over: every step draws how often, every evaluation may ask for another number of turns.

Shapes: B rows, T tokens, D width.
"""

import numpy as np
import torch
from torch import Tensor, nn

from adapters.base import Context, Metric, Prepared, StepOutput
from adapters.default import DefaultModelAdapter
from adapters.randomness import Noise
from configs.schema import Free, Positive
from models.layers.cache import KVCache, StateCache
from models.layers.decoder import Hidden
from models.layers.flops import Flops, matmul_flops
from models.layers.roles import Rule
from models.vanilla import Vanilla, VanillaConfig, block_flops


class Config(VanillaConfig):
    max_depth: Free[Positive] = 4  # training draws from 1 to this
    eval_depth: Free[Positive] = 4  # scores and text


class RecurrentDepth(Vanilla):
    Config = Config

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.turn = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=False)

    def forward(self, tokens, doc_ids=None, cache=None, depth: int | None = None) -> Tensor:
        start, shared = self.embed(tokens, doc_ids, cache)
        x = torch.zeros_like(start)
        for i in range(depth or self.cfg.eval_depth):
            kept = None if cache is None else cache[f"turn_{i}"]
            x = self.turn(torch.cat((x, start), dim=-1))
            for block in self.layers:
                x = block(x, *shared, kept)
            if kept is not None:
                kept.advance(tokens.shape[1])
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def init_cache(self, rows: int) -> StateCache:
        """Each turn has keys of its own."""
        c = self.cfg
        return StateCache(**{f"turn_{i}": KVCache(c.n_layers, rows) for i in range(c.eval_depth)})

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        nn.init.orthogonal_(self.turn.weight, generator=generator)

    @property
    def kept_passes(self) -> int:
        return self.cfg.n_layers * self.cfg.max_depth

    def param_roles(self) -> list[Rule]:
        return [Rule(r"turn\.weight", "recurrent", width=2 * self.cfg.d_model), *super().param_roles()]

    def flops(self, seq_len: int, depth: float | None = None) -> Flops:
        """Of so many turns; the plan: of the mean over the draws."""
        turn = block_flops(self.cfg, seq_len) * self.cfg.n_layers + matmul_flops(self.turn.weight.numel())
        return turn * (depth or (1 + self.cfg.max_depth) / 2) + matmul_flops(self.head_weight.numel())


class RecurrentDepthAdapter(DefaultModelAdapter):
    console_metrics = ("depth",)

    def prepare(self, batch, ctx: Context) -> Prepared:
        prepared = super().prepare(batch, ctx)
        prepared.host["depth"] = self.depth(ctx)
        return prepared

    def depth(self, ctx: Context) -> int:
        """One number for all rows of a step, a function of (seed, step)."""
        if ctx.phase == "eval":
            return self.model_cfg.eval_depth
        if ctx.of_draws != "drawn":
            most = self.model_cfg.max_depth
            return most if ctx.of_draws == "most" else (1 + most) // 2
        u = Noise(ctx.seed, ctx.step, "train", np.zeros(1)).uniform("depth", 1)
        return 1 + int(u * self.model_cfg.max_depth)

    def hidden(self, prepared: Prepared) -> Hidden:
        t = prepared.tensors
        return Hidden(self.model(t["inputs"], doc_ids=t["doc_ids"], depth=prepared.host["depth"]))

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        output = super().step_output(hidden, prepared)
        depth, inputs = prepared.host["depth"], prepared.tensors["inputs"]
        output.metrics["depth"] = Metric(depth)
        output.flops = self.model.flops(inputs.shape[1], depth).training_per_token * inputs.numel()
        return output
