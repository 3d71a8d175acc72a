"""Mixture of depths: in every other block a router picks a few tokens of each row, and only these pass the block.

Raposo et al. 2024 (arXiv:2404.02258). The trunk is the control's. What is picked is the best k = C T of a row, so that
the work is known beforehand and which tokens get it is learned. To know the best of a row takes the whole row: text and
scores must not look ahead, and there every token decides for itself, by what has learned to foretell the choice.

Shapes: B rows, T tokens, D width, k chosen tokens of a row, R routed blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from configs.schema import Free, NonNegative, NonNegativeFloat, Positive
from kernels.attention import Visible
from kernels.precision import at_least_fp32, own_dtypes
from models.layers.cache import KVCache, PartlyRaggedCache
from models.layers.flops import Flops, matmul_flops
from models.layers.hashing import LayerNoise
from models.layers.recompute import Kept
from models.layers.roles import Rule
from models.vanilla import Block, PlainBlock, Rotation, Vanilla, VanillaConfig, block_flops

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from kernels.attention import Plan

__all__ = ["MoD", "MoDConfig"]

# Of the rate of w, as it multiplies what a block adds: at that of matrices a score moves by about half of what it may
# become in a single step, and the largest grow to 9. 300 steps at `preset=nano`: 1.924 bits per byte at 1, 1.920 at
# 0.1 (4), 1.918 at 0.02 (3.5).
ROUTER_RATE = 0.1

_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda r: r,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class MoDConfig(VanillaConfig):
    capacity: Annotated[float, Field(gt=0, le=1)] = (
        0.125  # C: share of a row's tokens that pass a routed block
    )
    every_other: bool = True  # False: every block is routed
    mod_offset: NonNegative = 1  # the first routed block
    router_type: Literal["learned", "random"] = "learned"  # random: Gaussian scores, the paper's control
    router_act: Literal["none", "sigmoid", "tanh"] = "none"  # of what a block's update is multiplied by
    causal_method: Literal["predictor", "aux_loss"] = "predictor"
    pred_hidden: Positive = 128
    mod_bce_weight: Free[NonNegativeFloat] = 0.01

    tiny = {"pred_hidden": 16}
    examples = {"capacity": 0.25}

    @property
    def routed_layers(self) -> list[int]:
        return [*range(self.mod_offset, self.n_layers, 2)] if self.every_other else [*range(self.n_layers)]

    def chosen(self, length: int) -> int:
        """k of a row of `length` tokens: the floor of C T, and 1 at least."""
        return max(1, math.floor(round(self.capacity * length, 9)))  # 0.29 * 100 is 28.999999999999996

    def problems(self, run: RunConfig) -> list[str]:
        found = super().problems(run)
        if not self.routed_layers:
            found.append(
                f"model_cfg.mod_offset ({self.mod_offset}) leaves none of model_cfg.n_layers ({self.n_layers}) routed: "
                f"blocks are counted from 0; nearest: mod_offset={self.n_layers - 1}, or "
                f"n_layers={self.mod_offset + 1}"
            )
        return found

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if not self.every_other:
            found["mod_offset"] = "every_other=false"
        if self.router_type == "random":
            found |= dict.fromkeys(("causal_method", "pred_hidden", "mod_bce_weight"), "router_type=random")
        elif self.causal_method == "aux_loss":
            found["pred_hidden"] = "causal_method=aux_loss"
        return found


@dataclass(frozen=True, eq=False)
class Routing:
    """What routed blocks are told of a pass. `choose`: whether the best k of a row pass, not who decides to; `visible`:
    what tokens may see where all pass; `plan_of`: attention to something else; `past`: tokens before; `row_seeds` (B,)
    int64: of random scores."""

    choose: bool
    visible: Visible
    plan_of: Callable[[Visible], Plan]
    past: int
    row_seeds: Tensor


class LearnedRouter(nn.Module):
    """r = x w on the raw residual stream; and what foretells the choice, r itself or a small network that reads x and
    gives it no gradient."""

    def __init__(self, cfg: MoDConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(cfg.d_model, 1, bias=False)
        self.predictor = Predictor(cfg.d_model, cfg.pred_hidden) if cfg.causal_method == "predictor" else None
        self.kept = Kept()

    def forward(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> scores r and logits of entering, (B, T) both, in at least fp32."""
        with own_dtypes(x.device):
            x = x.to(at_least_fp32(x.dtype))
            score = self.kept(F.linear(x, self.proj.weight.to(x.dtype)).squeeze(-1))
            return score, score if self.predictor is None else self.predictor(x.detach())


class Predictor(nn.Module):
    """D -> h -> 1, on states made to have mean square 1: the stream of a fresh model is small, and grows with depth."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T)"""
        up, down = ((m.weight.to(x.dtype), m.bias.to(x.dtype)) for m in (self.up, self.down))
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        return F.linear(F.silu(F.linear(x, *up)), *down).squeeze(-1)


class RandomRouter(nn.Module):
    """Gaussian scores, a function of seed, layer and position; who is above the quantile 1 - C enters."""

    def __init__(self, cfg: MoDConfig, layer: int) -> None:
        super().__init__()
        self.noise, self.capacity = LayerNoise(layer), cfg.capacity

    def forward(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """As `LearnedRouter`."""
        uniform = self.noise(routing.row_seeds, x.shape[1], routing.past).to(at_least_fp32(x.dtype))
        return torch.special.ndtri(uniform), uniform - (1 - self.capacity)


class RoutedBlock(Block):
    """x[S] + r[S] (a + FFN(norm(x[S] + a))), a = attention among S; the other tokens stay as they are, bit for bit."""

    def __init__(self, cfg: MoDConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        self.cfg, self.layer, self.act = cfg, layer, _ACTS[cfg.router_act]
        self.router = LearnedRouter(cfg) if cfg.router_type == "learned" else RandomRouter(cfg, layer)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        plan: Plan,
        rotation: Rotation | None,
        routing: Routing,
        cache: PartlyRaggedCache | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, T, D), and (B, T) each: where k are chosen `score`, `logit` and `chosen` (bool), else who `entered`
        (bool)."""
        score, logit = self.router(x, routing)
        if routing.choose:
            assert cache is None, "of a part of a row the best are not known"
            places = best(score.detach(), self.cfg.chosen(x.shape[1]))
            chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, places, True)
            x = self._of_chosen(x, score, places, rotation, routing)
            return x, {"score": score, "logit": logit, "chosen": chosen}
        entered = logit > 0
        scale = self.act(score)[..., None]
        if cache is None:
            x = self._masked(x, scale, entered, rotation, routing)
        else:
            x = self._of_entering(x, scale, entered, rotation, routing, cache)
        return x, {"entered": entered}

    def _of_chosen(
        self, x: Tensor, score: Tensor, places: Tensor, rotation: Rotation | None, routing: Routing
    ) -> Tensor:
        """Computes the tokens at `places` (B, k) alone."""
        rows, length = x.shape[:2]
        first = torch.arange(0, rows * length, length, device=x.device)[:, None]
        flat = (first + places).flatten()  # (B k,): rising, no two the same
        part = x.flatten(0, 1).index_select(0, flat).unflatten(0, places.shape)  # (B, k, D)
        scale = self.act(score.flatten().index_select(0, flat)).view(*places.shape, 1)
        plan = routing.plan_of(among(places, flat, routing.visible))
        part = self._updated(part, scale, plan, turned(rotation, places))
        # A copy, not a sum: there is nothing to add in another order, here and in backward.
        return x.flatten(0, 1).index_copy(0, flat, part.flatten(0, 1)).view_as(x)

    def _masked(
        self, x: Tensor, scale: Tensor, entered: Tensor, rotation: Rotation | None, routing: Routing
    ) -> Tensor:
        """Computes all tokens, and takes what has entered: shapes do not depend on the text."""
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        seen = entered[:, None, None] | itself  # (B, 1, T, T)
        plan = routing.plan_of(replace(routing.visible, mask=seen))
        return torch.where(entered[..., None], self._updated(x, scale, plan, rotation), x)

    def _of_entering(
        self,
        x: Tensor,
        scale: Tensor,
        entered: Tensor,
        rotation: Rotation | None,
        routing: Routing,
        cache: PartlyRaggedCache,
    ) -> Tensor:
        """Computes what enters alone."""
        entering = cache.ragged[self.layer].enter(entered, routing.past)
        if entering is None:
            return x
        flat, real, places = (i.to(x.device) for i in (entering.flat, entering.real, entering.places))
        part, scale = (t.flatten(0, 1)[flat].unflatten(0, places.shape) for t in (x, scale))  # (R, M, ...)
        seen = entering.seen(self.cfg.sliding_window).to(x.device)  # (R, 1, M, S)
        rows, _, queries, keys = seen.shape
        visible = Visible(rows, queries, keys, x.device, causal=False, mask=seen)
        plan = routing.plan_of(visible)
        part = self._updated(part, scale, plan, turned(rotation, places), entering)
        return x.flatten(0, 1).index_copy(0, flat[real], part.flatten(0, 1)[real]).view_as(x)

    def _updated(
        self, x: Tensor, scale: Tensor, plan: Plan, rotation: Rotation | None, cache: Any = None
    ) -> Tensor:
        """x (R, M, D), each token's scale (R, M, 1): the product in the scale's dtype."""
        branch = self.self_attn(self.input_layernorm(x), plan, rotation, cache)
        _, y = self.post_attention_layernorm(x, branch)
        return (x + scale * (branch.to(scale.dtype) + self.mlp(y))).to(x.dtype)


def best(scores: Tensor, k: int) -> Tensor:
    """Places of the k highest of scores (B, T), rising, (B, k); of equal ones the first: `topk` does not promise it."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values


def among(places: Tensor, flat: Tensor, visible: Visible) -> Visible:
    """What tokens at `places` (B, k), `flat` (B k,) of all, see of each other where all tokens see `visible`: a window
    counts the positions of the text."""
    doc_ids, offsets, mask = visible.doc_ids, visible.cu_seqlens, None
    if doc_ids is not None:
        doc_ids = doc_ids.gather(1, places)
    if offsets is not None:  # how many of the chosen stand before each
        offsets = torch.searchsorted(flat, offsets.to(flat.dtype), out_int32=True)
    if visible.window is not None:
        mask = places[:, None, :, None] - places[:, None, None] < visible.window  # (B, 1, k, k)
    rows, k = places.shape
    return Visible(rows, k, k, places.device, doc_ids=doc_ids, cu_seqlens=offsets, mask=mask)


def turned(rotation: Rotation | None, places: Tensor) -> Rotation | None:
    """The rotation of tokens at `places` (B, k) of those that it is of: (B, k, 1, r/2) each."""
    if rotation is None:
        return None
    cos, sin = rotation
    return cos[places], sin[places]


class MoD(Vanilla):
    """`forward` routes causally, as text and scores are; with `choose` the best k of each row pass, as in training.
    `row_seeds` (B,) int64: of the scores of a random router, 0 for all where they are not given."""

    Config = MoDConfig
    cfg: MoDConfig

    def shared(
        self,
        tokens: Tensor,
        past: int,
        doc_ids: Tensor | None,
        cu_seqlens: Tensor | None = None,
        choose: bool = False,
        row_seeds: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The plan of attention, the rotation, and what routed blocks are told."""
        plan, rotation = super().shared(tokens, past, doc_ids, cu_seqlens)
        if row_seeds is None:
            row_seeds = tokens.new_zeros(len(tokens))
        plan_of = partial(self.plan, dtype=plan.options.dtype)
        return plan, rotation, Routing(choose, plan.visible, plan_of, past, row_seeds)

    def new_block(self, layer: int) -> nn.Module:
        return (RoutedBlock if layer in self.cfg.routed_layers else PlainBlock)(self.cfg, layer)

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """As the control's; routers and predictors N(0, 0.02^2), biases 0."""
        super().init_part(part, generator)
        for module in part.modules():
            if isinstance(module, LayerNoise):
                module.init_weights()

    def init_cache(self, rows: int) -> KVCache:
        return PartlyRaggedCache(self.cfg.n_layers, rows, self.cfg.routed_layers)

    def param_roles(self) -> list[Rule]:
        return [
            Rule(r".*\.router\.proj\.weight", "router", lr_mult=ROUTER_RATE, wd_mult=0.0),
            Rule(r".*\.router\.predictor\.down\.weight", "router", wd_mult=0.0, width_power=0.0),
            Rule(r".*\.router\..*\.weight", "router", wd_mult=0.0),
            *super().param_roles(),
        ]

    def router_flops(self) -> Flops:
        """Of a block's router and its predictor, per token. Through the latter nothing is propagated back to x."""
        c = self.cfg
        if c.router_type == "random":
            return Flops(0.0, 0.0)
        router = matmul_flops(c.d_model)
        if c.causal_method == "aux_loss":
            return router
        read = c.d_model * c.pred_hidden
        return router + Flops(2.0 * read, 4.0 * read) + matmul_flops(c.pred_hidden)

    def routed_flops(self, seq_len: int) -> Flops:
        """Of a routed block, per token of the row: k of T tokens, each of which sees (k + 1) / 2 on average, and those
        of a window as if the chosen ones stood evenly."""
        c, k = self.cfg, self.cfg.chosen(seq_len)
        within = c.sliding_window and -(-c.sliding_window * k // seq_len)
        passed = block_flops(c.model_copy(update={"sliding_window": within}), k)
        return passed * (k / seq_len) + self.router_flops()

    def flops(self, seq_len: int) -> Flops:
        """Where k tokens of a row are chosen, as in training. Scores compute routed blocks for all tokens, text for
        those that enter."""
        routed = len(self.cfg.routed_layers)
        full = self.block_flops(seq_len) * (self.cfg.n_layers - routed)
        return full + self.routed_flops(seq_len) * routed + matmul_flops(self.head_weight.numel())

    def passes(self, path: str) -> float:
        _, layer, *_ = path.split(".")
        return self.cfg.capacity if int(layer) in self.cfg.routed_layers else 1.0

    @property
    def kept_passes(self) -> float:
        """Passes of all tokens through a block, of which a step keeps activations."""
        routed = len(self.cfg.routed_layers)
        return self.cfg.n_layers - routed + routed * self.cfg.capacity

    def active_parameters(self) -> int:
        """Those that act on a token on average: of a routed block's attention and feed-forward layer the share C."""
        total = sum(p.numel() for p in self.parameters())
        routed = sum(
            p.numel()
            for block in self.layers
            if isinstance(block, RoutedBlock)
            for name, p in block.named_parameters()
            if not name.startswith("router.")
        )
        return total - round((1 - self.cfg.capacity) * routed)

    def hf_views(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        raise ValueError(f"type=mod: {self.hf.name} has no blocks that tokens go around")
