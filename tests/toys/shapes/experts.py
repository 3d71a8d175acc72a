"""One of four experts per token, kept equally busy by a loss and by a bias that is counted out after every step.

Shapes: B rows, T tokens, D width, E experts, f hidden width of one, L blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.base import Context, LossTerm, Metric, Prepared, StepOutput
from adapters.default import DefaultModelAdapter
from configs.schema import Free, NonNegativeFloat, Positive
from models.layers.decoder import Hidden
from models.layers.flops import Flops, matmul_flops
from models.layers.init import INIT_STD, normal_, residual_std
from models.layers.roles import Rule
from models.vanilla import Block, Vanilla, VanillaConfig


class Config(VanillaConfig):
    n_experts: Positive = 4
    balance_weight: Free[NonNegativeFloat] = 0.01
    bias_rate: Free[NonNegativeFloat] = 0.01


class TopOne(nn.Module):
    """Every token gathers its expert's weights: nothing is sorted, dropped or waited for."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.router = nn.Linear(cfg.d_model, cfg.n_experts, bias=False)
        inner = (2 if cfg.use_swiglu else 1) * cfg.hidden_width
        self.up = nn.Parameter(torch.empty(cfg.n_experts, inner, cfg.d_model))
        self.down = nn.Parameter(torch.empty(cfg.n_experts, cfg.d_model, cfg.hidden_width))
        self.register_buffer("bias", torch.empty(cfg.n_experts))  # orders experts, weighs none
        self.use_swiglu = cfg.use_swiglu

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> y (B, T, D), probabilities (B, T, E), one-hot choices (B, T, E)."""
        probabilities = self.router(x).softmax(-1)
        chosen = (probabilities.detach() + self.bias).argmax(-1)  # (B, T)
        y = (self.up[chosen] @ x[..., None]).squeeze(-1)  # (B, T, f), or 2 f
        if self.use_swiglu:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        else:
            y = F.gelu(y, approximate="tanh")
        y = (self.down[chosen] @ y[..., None]).squeeze(-1) * probabilities.gather(-1, chosen[..., None])
        experts = torch.arange(probabilities.shape[-1], device=x.device)
        return y, probabilities, (chosen[..., None] == experts).to(probabilities.dtype)


class ExpertBlock(Block):
    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__(cfg, layer)
        self.mlp = TopOne(cfg)

    def forward(self, x, bias, rotation, cache=None):
        """Also what the experts' load is counted from: blocks may run twice, so they return it and keep nothing."""
        x = x + self.self_attn(self.input_layernorm(x), bias, rotation, cache)
        y, probabilities, chosen = self.mlp(self.post_attention_layernorm(x))
        # Per row, so that a row's balance does not depend on which rows it shares a micro-batch with.
        balance = chosen.shape[-1] * (chosen.mean(1) * probabilities.mean(1)).sum(-1)  # (B,), 1 if balanced
        return x + y, balance, chosen.sum((0, 1))


class Experts(Vanilla):
    Config = Config

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.layers = nn.ModuleList(ExpertBlock(cfg, layer) for layer in range(cfg.n_layers))

    def forward(self, tokens, doc_ids=None, cache=None) -> Hidden:
        x, shared = self.embed(tokens, doc_ids, cache)
        balance, load = [], []
        for block in self.layers:
            x, *counted = block(x, *shared, cache)
            balance.append(counted[0])
            load.append(counted[1])
        if cache is not None:
            cache.advance(tokens.shape[1])
        extra = {"balance": torch.stack(balance).mean(0), "load": torch.stack(load)}  # (B,), (L, E)
        return Hidden(self.norm(x), extra)

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        for block in self.layers:
            normal_(block.mlp.up, INIT_STD, generator)
            normal_(block.mlp.down, residual_std(self.cfg.n_layers), generator)
            nn.init.zeros_(block.mlp.bias)

    def param_roles(self) -> list[Rule]:
        gate_and_up = 2 if self.cfg.use_swiglu else 1
        return [
            Rule(r"layers\.\d+\.mlp\.router\.weight", "router"),
            Rule(r"layers\.\d+\.mlp\.up", "matrix", split=gate_and_up),
            Rule(r"layers\.\d+\.mlp\.down", "matrix"),
            *super().param_roles(),
        ]

    def flops(self, seq_len: int) -> Flops:
        """One expert multiplies a token, as the control's MLP does; and the router."""
        routers = self.cfg.n_layers * self.cfg.n_experts * self.cfg.d_model
        return super().flops(seq_len) + matmul_flops(routers)

    def active_parameters(self) -> int:
        idle = 1 - 1 / self.cfg.n_experts
        experts = sum(block.mlp.up.numel() + block.mlp.down.numel() for block in self.layers)
        return sum(p.numel() for p in self.parameters()) - round(idle * experts)


def busiest(load: Tensor) -> dict[str, float]:
    """The share of tokens that the busiest expert of a block has, over all blocks; load (L, E)."""
    return {"busiest": float(load.amax(1).sum() / load.sum())}


class ExpertsAdapter(DefaultModelAdapter):
    console_metrics = ("busiest",)
    load: Tensor | float = 0.0  # tokens of this step per block and expert, (L, E)

    def prepare(self, batch, ctx: Context) -> Prepared:
        prepared = super().prepare(batch, ctx)
        prepared.denominators["rows"] = float(len(batch.rows))
        return prepared

    def on_step_start(self, ctx: Context, total_steps: int) -> None:
        self.load = 0.0

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        output = super().step_output(hidden, prepared)
        balance, load = hidden.extra["balance"].sum(), hidden.extra["load"]
        output.terms["balance"] = LossTerm(balance, "rows", self.model_cfg.balance_weight, likelihood=False)
        output.metrics["load"] = Metric(load, figures=busiest)
        for i, tokens in enumerate(load.sum(0)):
            output.metrics[f"expert_{i}"] = Metric(tokens, load.sum())
        self.load = self.load + load
        return output

    def after_step(self, step: int, skipped: Tensor) -> None:
        """By the tokens of all processes, so that the buffers of all are the same."""
        for block, load in zip(self.model.layers, self.add_up(self.load), strict=True):
            nudge = self.model_cfg.bias_rate * (load.mean() - load).sign()
            block.mlp.bias += torch.where(skipped > 0, 0.0, nudge)
