"""Which chapters of a memory a token reads: what a router sees of the text so far, and what it decides.

A decision never sees a later token, unless the run says so (`lookahead`). Losses that keep chapters in use: Fedus et
al. 2021 (Switch, arXiv:2101.03961, eq. 4-6), Shazeer et al. 2017 (1701.06538, eq. 6-7), Zoph et al. 2022 (ST-MoE,
2202.08906, eq. 5).

Shapes: B rows, T tokens, S tokens with those of a cache, D width, C chapters to choose from, K of them chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import at_least_fp32, own_dtypes
from models.layers.cache import KVCache
from models.layers.init import INIT_STD, normal_
from models.layers.recompute import Kept

if TYPE_CHECKING:
    from models.memory.config import MemoryConfig, Strategy

__all__ = ["Choice", "MemoryCache", "Pooling", "Router", "auxiliary", "balance", "squared_normaliser"]


class MemoryCache(KVCache):
    """Keys and values, and of each routed layer what decisions of later tokens are pooled of: the sum of a text's first
    states, or the latest ones."""

    def __init__(self, n_layers: int, rows: int) -> None:
        super().__init__(n_layers, rows)
        self.pooled: dict[int, Tensor] = {}  # by layer, (B, n, D); replaced, never written into

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.pooled = {layer: states.index_select(0, rows) for layer, states in self.pooled.items()}

    def snapshot(self) -> tuple[int, dict[int, Tensor]]:  # type: ignore[override]
        return self.length, dict(self.pooled)

    def restore(self, snapshot: tuple[int, dict[int, Tensor]]) -> None:  # type: ignore[override]
        length, pooled = snapshot
        super().truncate(length)
        self.pooled = dict(pooled)

    def truncate(self, length: int) -> None:
        if self.pooled and length != self.length:
            raise ValueError("states that decisions are pooled of cannot be cut back; restore a snapshot")
        super().truncate(length)


@dataclass(frozen=True, eq=False)
class Pooling:
    """How decisions are pooled in a pass. `first` (B, T) int64: where in its row the document of each token begins;
    None: one document each. `valid` (B, T) bool: which tokens are text, behind which there is padding; None: all.
    `past`: tokens that a cache holds. `openings` (B, T) or (B, 1) int64: how many tokens the document of each token
    begins with that are given, such as those of a chat before its first answer; None: `window` ones.

    `sequence`: one decision for a document, the mean of its opening, for the tokens behind that; those of the opening
    have that of 0, as nothing is known of the text. With `lookahead` the mean of all, for all. `rolling`: of the last
    `window` tokens, the token itself included. `token`: the token itself.
    """

    strategy: Strategy
    window: int
    lookahead: bool = False
    first: Tensor | None = None
    valid: Tensor | None = None
    past: int = 0
    openings: Tensor | None = None

    def __call__(self, x: Tensor, layer: int, cache: MemoryCache | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> what the router reads z (B, T, D), in at least fp32; where decisions are made (B, T) bool:
        once for a document, or everywhere; never those of 0, and none of padding."""
        z, decided = self._pooled(x.to(at_least_fp32(x.dtype)), layer, cache)
        return z, decided if self.valid is None else decided & self.valid

    def _pooled(self, x: Tensor, layer: int, cache: MemoryCache | None) -> tuple[Tensor, Tensor]:
        if self.strategy == "token" or (self.strategy == "rolling" and self.window == 1):
            return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if self.strategy == "rolling":
            return self._rolling(x, layer, cache)
        if self.lookahead:
            assert cache is None, "what follows is not known"
            return self._whole(x)
        return self._prefix(x, layer, cache)

    def _places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token, (B, T): where it stands in its row, and where its document begins."""
        here = torch.arange(self.past, self.past + x.shape[1], device=x.device).expand(x.shape[:2])
        return here, torch.zeros_like(here) if self.first is None else self.first

    def _rolling(self, x: Tensor, layer: int, cache: MemoryCache | None) -> tuple[Tensor, Tensor]:
        here, first = self._places(x)
        start = torch.maximum(first, here - self.window + 1)
        before = 0
        if cache is not None:
            x, before = _behind(cache, layer, x)
            cache.pooled[layer] = x[:, max(0, x.shape[1] - self.window + 1) :]
        shift = self.past - before  # of the first state at hand
        return means(x, start - shift, here - shift), torch.ones_like(here, dtype=torch.bool)

    def _prefix(self, x: Tensor, layer: int, cache: MemoryCache | None) -> tuple[Tensor, Tensor]:
        here, first = self._places(x)
        place = here - first  # (B, T), in the document
        size = (
            torch.full_like(place, self.window)
            if self.openings is None
            else self.openings.expand(place.shape)
        )
        decided = place >= size
        if cache is None:
            pooled = means(x, first, (first + size - 1).clamp(max=x.shape[1] - 1))
        else:
            total = x.masked_fill(decided[..., None], 0.0).sum(1, keepdim=True)  # (B, 1, D)
            if layer in cache.pooled:
                total = total + cache.pooled[layer]
            cache.pooled[layer] = total
            pooled = total / size[..., None]
        return torch.where(decided[..., None], pooled, 0.0), place == size

    def _whole(self, x: Tensor) -> tuple[Tensor, Tensor]:
        here, first = self._places(x)
        valid = torch.ones_like(here, dtype=torch.bool) if self.valid is None else self.valid
        number = torch.zeros_like(here).scatter_add(1, first, valid.long())  # (B, T), where documents begin
        sums = torch.zeros_like(x).scatter_add(
            1, first[..., None].expand(x.shape), x.masked_fill(~valid[..., None], 0.0)
        )
        pooled = sums / number.clamp(min=1)[..., None]
        return pooled.gather(1, first[..., None].expand(x.shape)), (here == first) & valid


def _behind(cache: MemoryCache, layer: int, x: Tensor) -> tuple[Tensor, int]:
    """What the cache holds of a layer, with x (B, T, D) behind it; and how many it held."""
    held = cache.pooled.get(layer)
    return (x, 0) if held is None else (torch.cat((held, x), 1), held.shape[1])


def means(x: Tensor, start: Tensor, last: Tensor) -> Tensor:
    """x (B, S, D), places (B, T) both, start <= last -> means over x[start..last], (B, T, D)."""
    sums = F.pad(x.cumsum(1), (0, 0, 1, 0))  # (B, 1 + S, D)

    def upto(place: Tensor) -> Tensor:
        return sums.gather(1, place[..., None].expand(*place.shape, x.shape[2]))

    return (upto(last + 1) - upto(start)) / (last + 1 - start)[..., None]


@dataclass
class Choice:
    """`chapters` (B, T, J) int64: those that a token reads, the shared ones first; `bias` (B, T, J) of the logits of
    their keys; `factor` (B, T, J): of their tokens, None = 1; `gain` (B, T): 1, with the gradient of the chosen
    probability; `logits` and their softmax `shares`, (B, T, C) both."""

    chapters: Tensor
    bias: Tensor
    factor: Tensor | None
    gain: Tensor
    logits: Tensor
    shares: Tensor


class Router(nn.Module):
    """Linear scores of chapters, in at least fp32; the best K, of equal ones the first."""

    def __init__(self, cfg: MemoryConfig) -> None:
        super().__init__()
        self.top_k, self.shared, self.weighting = (
            cfg.top_k_chapters,
            cfg.num_shared_chapters,
            cfg.chapter_weighting,
        )
        self.scale = cfg.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(cfg.routed_chapters, cfg.d_model))
        self.bias = nn.Parameter(torch.empty(cfg.routed_chapters))
        self.kept = Kept()

    def forward(self, z: Tensor) -> Choice:
        """z (B, T, D)"""
        with own_dtypes(z.device):
            logits = self.kept(F.linear(z, self.weight.to(z.dtype), self.bias.to(z.dtype)))  # (B, T, C)
            chosen = best(logits.detach(), self.top_k)  # (B, T, K)
            shares = logits.softmax(-1)
            of_chosen = shares.gather(-1, chosen)
            total = of_chosen.sum(-1, keepdim=True)
            weights = of_chosen / total
            bias, factor = torch.full_like(weights, 0.0), None
            if self.weighting == "log_bias":
                bias = (self.top_k * weights).log()
            elif self.weighting == "scale_memory":
                factor = F.pad(weights, (self.shared, 0), value=1.0)
            if self.scale != 1:
                bias = bias + torch.tensor(self.scale).log().item()
            everyone = torch.arange(self.shared, device=z.device).expand(*z.shape[:2], -1)
            return Choice(
                chapters=torch.cat((everyone, chosen + self.shared), -1),
                bias=F.pad(bias, (self.shared, 0)),
                factor=factor,
                gain=(total / total.detach()).squeeze(-1),
                logits=logits,
                shares=shares,
            )

    def init_weights(self, generator: torch.Generator) -> None:
        normal_(self.weight, INIT_STD, generator)
        nn.init.zeros_(self.bias)


def best(logits: Tensor, k: int) -> Tensor:
    """Places of the k highest of (..., C), the highest first; of equal ones the first: `topk` does not promise it."""
    # A copy, as what backward keeps of a view is the whole order.
    return logits.argsort(dim=-1, descending=True, stable=True)[..., :k].clone()


def balance(load: Tensor, importance: Tensor) -> Tensor:
    """C sum_c f_c P_c of each layer (R,): f_c the share of all choices that went to c, of which there are `load`
    (R, C), P_c its mean probability. 1 where all are alike; 0 of no decisions."""
    share = load / load.sum(-1, keepdim=True).clamp(min=1)
    return load.shape[-1] * (share * importance).sum(-1) / decisions(importance)


def auxiliary(importance: Tensor) -> Tensor:
    """Var(I) / mean(I)^2 over chapters, of their importance I_c = sum p_c over decisions (R, C): 0 where all are alike,
    and of no decisions."""
    mean = decisions(importance)[:, None] / importance.shape[-1]
    return (((importance - importance.mean(-1, keepdim=True)) / mean) ** 2).mean(-1)


def squared_normaliser(squares: Tensor, importance: Tensor) -> Tensor:
    """Mean of logsumexp^2 over decisions, of which `squares` (R,) are the sums; 0 of none."""
    return squares / decisions(importance)


def decisions(importance: Tensor) -> Tensor:
    """How many there are (R,), as probabilities of each add up to 1; of none 1."""
    return importance.detach().sum(-1).clamp(min=1)
