"""A feed-forward layer of many experts of which every token uses a few: gates, dispatch, experts.

Nothing is dropped and nothing is padded: assignments are sorted by expert, multiplied in groups, and brought back.
Gates: Jiang et al. 2024 (Mixtral, arXiv:2401.04088), DeepSeek-AI 2024 (DeepSeek-V3, 2412.19437, section 2.1.2);
balance: Fedus et al. 2021 (Switch, 2101.03961, eq. 4-6), Zoph et al. 2022 (ST-MoE, 2202.08906, eq. 5), Wang et al. 2024
(2408.15664); dispatch without capacity: Gale et al. 2022 (MegaBlocks, 2211.15841).

Shapes: B rows, T tokens, N = B T, D width, E experts, k of them per token, f hidden width of one, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.choose import UsesKernels
from kernels.grouped_linear import grouped_linear
from kernels.precision import at_least_fp32, own_dtypes
from models.layers.hashing import LayerNoise
from models.layers.init import INIT_STD, normal_
from models.layers.recompute import Kept

__all__ = [
    "BiasedGate",
    "ExpertLayer",
    "Experts",
    "Gate",
    "SoftmaxGate",
    "active_parameters",
    "expert_layers",
]

CORRECTION_BIAS = "e_score_correction_bias"  # the buffer that moves choices, as transformers calls it


@dataclass
class Choice:
    """What a gate decides of tokens: `experts` (..., k) int64, distinct; `weights` (..., k) of their outputs; `shares`
    (..., E), how much of the token each expert would get, which sum to 1."""

    experts: Tensor
    weights: Tensor
    shares: Tensor


class Gate(nn.Module):
    """Scores of experts, in at least fp32: `logits`, and what is chosen by them, `choose`."""

    def __init__(self, width: int, experts: int, top_k: int, jitter: float = 0.0, layer: int = 0) -> None:
        super().__init__()
        self.top_k, self.jitter, self.noise = top_k, jitter, LayerNoise(layer)
        self.weight = nn.Parameter(torch.empty(experts, width))

    def logits(self, x: Tensor, row_seeds: Tensor | None) -> Tensor:
        """x (B, T, D) -> (B, T, E). `row_seeds` (B,) int64: of the jitter, a factor from [1 - j, 1 + j] on every number
        that the gate reads, and on nothing that experts do; None: without."""
        with own_dtypes(x.device):
            x = x.to(at_least_fp32(x.dtype))
            if self.jitter and row_seeds is not None:
                factors = self.noise(row_seeds, x.shape[1] * x.shape[2]).view(x.shape)
                x = x * (1 + self.jitter * (2 * factors.to(x.dtype) - 1))
            return F.linear(x, self.weight.to(x.dtype))

    def choose(self, logits: Tensor) -> Choice:
        raise NotImplementedError(f"{type(self).__name__} must define choose")

    def init_weights(self, generator: torch.Generator) -> None:
        normal_(self.weight, INIT_STD, generator)
        self.noise.init_weights()


class SoftmaxGate(Gate):
    """Softmax over all experts, the best k of it, made to sum to 1 (Mixtral)."""

    def choose(self, logits: Tensor) -> Choice:
        shares = logits.softmax(-1)
        experts = logits.detach().topk(self.top_k, sorted=False).indices
        best = shares.gather(-1, experts)
        return Choice(experts, best / best.sum(-1, keepdim=True), shares)


class BiasedGate(Gate):
    """Sigmoids; chosen by score plus bias, weighted by score alone (DeepSeek-V3, eq. 12-16).

    `e_score_correction_bias` (E,) is no parameter: `balance` moves it after each step. It is fp32 in a model of any
    precision, as two experts may differ by less than bf16 can tell. `groups` of neighbouring experts are scored by
    the sum of their two best, and only those of the best `kept_groups` are chosen from.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        jitter: float = 0.0,
        layer: int = 0,
        *,
        factor: float = 1.0,
        groups: int = 1,
        kept_groups: int = 1,
    ) -> None:
        super().__init__(width, experts, top_k, jitter, layer)
        self.factor, self.groups, self.kept_groups = factor, groups, kept_groups
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))

    def choose(self, logits: Tensor) -> Choice:
        scores = logits.sigmoid()
        ranked = self._within_groups(scores.detach() + self.e_score_correction_bias)
        experts = ranked.topk(self.top_k, sorted=False).indices
        best = scores.gather(-1, experts)
        weights = self.factor * best / (best.sum(-1, keepdim=True) + 1e-20)
        return Choice(experts, weights, scores / scores.sum(-1, keepdim=True))

    def _within_groups(self, ranked: Tensor) -> Tensor:
        """(..., E) with -inf in all groups but the best."""
        if self.groups == self.kept_groups:
            return ranked
        grouped = ranked.unflatten(-1, (self.groups, -1))  # (..., G, E / G)
        of_group = grouped.topk(2, dim=-1).values.sum(-1)  # (..., G)
        best = of_group.topk(self.kept_groups, dim=-1).indices
        left_out = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(left_out[..., None], -torch.inf).flatten(-2)

    @torch.no_grad()
    def balance(self, counts: Tensor, speed: float, skipped: Tensor) -> None:
        """b_e <- b_e + speed * sign(mean(c) - c_e), in place; counts (E,) int64 of a whole step. Nothing where
        `skipped` is 1."""
        towards_mean = (counts.sum() - len(counts) * counts).sign()  # in integers: no rounding
        self.e_score_correction_bias += torch.where(skipped > 0, 0.0, speed * towards_mean)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves go for the bias, casts do not."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = before.to(self.e_score_correction_bias.device)
        return self

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        nn.init.zeros_(self.e_score_correction_bias)


class Experts(UsesKernels):
    """E networks of one shape, stacked: w down( silu(gate x) * up x ), or w down( gelu(up x) )."""

    def __init__(self, width: int, experts: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, hidden, width)) if gated else None
        self.up_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """x (M, D), sorted by expert, weights (M,) of their outputs, ends (E,) int32, where each one's rows end ->
        (M, D)."""
        up = grouped_linear(x, self.up_proj, ends, self.kernels)  # (M, f)
        if self.gate_proj is None:
            y = F.gelu(up, approximate="tanh")
        else:
            y = F.silu(grouped_linear(x, self.gate_proj, ends, self.kernels)) * up
        # In front of the last product, which is linear: narrower, and what it returns need not be kept.
        y = (y * weights[:, None]).to(y.dtype)
        return grouped_linear(y, self.down_proj, ends, self.kernels)

    def init_weights(self, generator: torch.Generator, down_std: float) -> None:
        for name, parameter in self.named_parameters():
            normal_(parameter, down_std if name == "down_proj" else INIT_STD, generator)

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"grouped_linear": {"columns": self.up_proj.shape[2]}}


class ExpertLayer(nn.Module):
    """Stands in the place of a block's feed-forward layer.

    `balance_over_batch`: the balance of all tokens together, as published, not of each row.
    """

    def __init__(
        self,
        gate: Gate,
        experts: Experts,
        shared_experts: nn.Module | None,
        *,
        dropout: float = 0.0,
        balance_over_batch: bool = False,
    ) -> None:
        super().__init__()
        self.gate, self.kept = gate, Kept()
        self.experts, self.shared_experts = experts, shared_experts
        self.dropout, self.balance_over_batch = dropout, balance_over_batch

    def forward(self, x: Tensor, row_seeds: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, T, D) -> y (B, T, D), and `statistics`."""
        # (B, T, E): computed anew they might choose others.
        logits = self.kept(self.gate.logits(x, row_seeds))
        choice = self.gate.choose(logits)
        loads = count(choice.experts.flatten(1), logits.shape[-1])  # (B, E)
        y = self._routed(x.flatten(0, 1), choice, loads.sum(0)).view(x.shape)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        y = F.dropout(y, self.dropout, self.training)
        return y, self.statistics(logits, choice, loads)

    def _routed(self, x: Tensor, choice: Choice, load: Tensor) -> Tensor:
        """x (N, D), load (E,) -> sum over k of weight * expert(x), (N, D)."""
        k = self.gate.top_k
        order = choice.experts.flatten().argsort(stable=True)  # (N k,): assignments by expert
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = load.cumsum(0).to(torch.int32)  # (E,)
        weights = _Permute.apply(choice.weights.flatten(), order, back)  # (N k,)
        y = self.experts(_ToExperts.apply(x, order, back, k), weights, ends)  # (N k, D)
        return _FromExperts.apply(y, order, back, k)

    def statistics(self, logits: Tensor, choice: Choice, loads: Tensor) -> dict[str, Tensor]:
        """Of each row: `load` (B, E), its assignments; `balance` (B,), 1 where experts are equally busy, E / k where
        the same always win; `router_z` (B,), the sum over tokens of the squared log-normaliser of the raw logits; for
        a gate with a bias `sequence_balance` (B,), without it."""
        told = {
            "load": loads,
            "balance": self._balance(loads, choice.shares),
            "router_z": logits.logsumexp(-1).square().sum(1),
        }
        if isinstance(self.gate, BiasedGate):
            best = logits.detach().topk(self.gate.top_k, sorted=False).indices  # sigmoid keeps their order
            unbiased = count(best.flatten(1), logits.shape[-1])
            told["sequence_balance"] = balance(unbiased, choice.shares.mean(1))
        return told

    def _balance(self, loads: Tensor, shares: Tensor) -> Tensor:
        if self.balance_over_batch:
            return balance(loads.sum(0), shares.mean((0, 1))).expand(len(loads))
        return balance(loads, shares.mean(1))


def count(experts: Tensor, number: int) -> Tensor:
    """How often each of `number` experts is among experts (B, M) int64 -> (B, E) int64. By adding ones: `bincount`
    would wait for the device."""
    return experts.new_zeros(len(experts), number).scatter_add_(1, experts, torch.ones_like(experts))


def balance(loads: Tensor, shares: Tensor) -> Tensor:
    """E sum_e f_e P_e: f the part of all assignments that each expert has, from loads (..., E), P the mean of shares
    (..., E) (Switch, eq. 4). Gradients go through P alone."""
    loads = loads.to(shares.dtype)
    parts = loads / loads.sum(-1, keepdim=True)
    return loads.shape[-1] * (parts * shares).sum(-1)


class _ToExperts(torch.autograd.Function):
    """Rows x (N, D) -> (N k, D) by expert. The gradient is a gather and a sum over k: adding into rows would be atomic
    on a GPU, and another result each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return _summed(gradients[0], back, ctx.k), None, None, None


class _FromExperts(torch.autograd.Function):
    """The transpose of `_ToExperts`: rows y (N k, D) by expert -> their sums over k, (N, D)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return _summed(y, back, k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return gradients[0].index_select(0, order // ctx.k), None, None, None


def _summed(y: Tensor, back: Tensor, k: int) -> Tensor:
    return y.index_select(0, back).unflatten(0, (-1, k)).sum(1)


class _Permute(torch.autograd.Function):
    """x (M,) in the order `order` (M,), of which `back` is the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return gradients[0].index_select(0, back), None, None


def expert_layers(model: nn.Module) -> Iterator[ExpertLayer]:
    """Those of a model, in the order in which its blocks tell of them."""
    return (module for module in model.modules() if isinstance(module, ExpertLayer))


def active_parameters(model: nn.Module) -> int:
    """Parameters that act on one token."""
    idle = 0
    for layer in expert_layers(model):
        experts = len(layer.experts.up_proj)
        stacked = sum(p.numel() for p in layer.experts.parameters())
        idle += stacked // experts * (experts - layer.gate.top_k)
    return sum(p.numel() for p in model.parameters()) - idle
