"""A layer of `current_best_gpt`, and what it is given of other layers.

Shapes: B rows, T tokens, D width, f hidden width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.choose import UsesKernels
from kernels.rms_norm import rms_norm
from models.current_best.attention import EPS, Attention, Shared
from models.current_best.config import OFF, CurrentBestConfig
from models.current_best.gates import Mudd
from models.layers.cache import StateCache
from models.layers.init import uniform_

__all__ = ["MLP", "Block", "Given", "PlainNorm"]

SKIP_START = -1.5  # sigmoid of it is the first strength of a skip


class PlainNorm(UsesKernels):
    """x / sqrt(mean(x^2) + eps), without a gain."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, EPS, self.kernels)


class Given(NamedTuple):
    """What a layer is given besides x, each (B, T, D) or None: the first state `x0`, vectors of the token's `bigram`
    and its `value`, the state `skip` that it adds, the state `late` that its attention reads; the states `mixed` that
    the last one mixes; and its `gates`, (B, T, n) or (n,) by name."""

    x0: Tensor
    bigram: Tensor | None
    value: Tensor | None
    skip: Tensor | None
    late: Tensor | None
    mixed: tuple[Tensor, ...]
    gates: dict[str, Tensor]


class MLP(nn.Module):
    """W_2 relu(W_1 x)^2 (So et al. 2021, arXiv:2109.08668)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())

    def init_weights(self, generator: torch.Generator) -> None:
        uniform_(self.up_proj.weight, 0.5 * self.up_proj.in_features**-0.5, generator)
        nn.init.zeros_(self.down_proj.weight)


class Mix(nn.Module):
    """All strengths of the last layer as numbers per token, and earlier states mixed into its input and its values
    (MUDD, see `models/current_best/gates.py`)."""

    def __init__(self, cfg: CurrentBestConfig, sources: int, valued: bool) -> None:
        super().__init__()
        self.sources, self.valued, self.heads = sources, valued, cfg.n_heads
        keep = _start_of_rho(cfg)
        self.kinds: dict[str, tuple[float, ...]] = {
            "values": (0.0,) * (sources + 1),
            "states": (0.0,) * (sources + 1),
            **({"value": (2.0, 2.0)} if valued else {}),
            "keep": (keep, keep),
            "post": (1.0, 1.0),
            **({"x0": (0.0,)} if cfg.of("x0_inject") == "gated" else {}),
            **({"bigram": (0.05,)} if cfg.bigram_rows else {}),
        }
        self.mudd = Mudd(cfg.d_model, [start for starts in self.kinds.values() for start in starts])

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        """x (B, T, D), not normalised -> of each kind its numbers, (B, T, 1) each."""
        numbers = iter(self.mudd(x).split(1, dim=-1))
        return {kind: [next(numbers) for _ in starts] for kind, starts in self.kinds.items()}

    def table(self, of: list[Tensor], value: Tensor) -> Tensor:
        """The value embedding, by a number for each half of the heads."""
        halves = [j * 2 // self.heads for j in range(self.heads)]
        gate = torch.cat([of[half] for half in halves], -1)  # (B, T, H)
        return (gate[..., None] * value.unflatten(-1, (self.heads, -1))).flatten(-2)


def _weighed(numbers: list[Tensor], states: tuple[Tensor, ...]) -> Tensor:
    total = numbers[0] * states[0]
    for number, state in zip(numbers[1:], states[1:], strict=True):
        total = total + number * state
    return total


def _start_of_rho(cfg: CurrentBestConfig) -> float:
    start = cfg.of("resid_lambda_init")
    return 1.0 if start == OFF else float(start)


class Block(UsesKernels):
    """x <- rho x + pi Attn(norm(x)) + g x_0 + g' b, then x <- rho x + pi MLP(norm(x)); every part but the two branches
    only where the fields say so."""

    def __init__(self, cfg: CurrentBestConfig, layer: int) -> None:
        super().__init__()
        layout = cfg.layout
        self.width, self.start_of_rho = cfg.d_model, _start_of_rho(cfg)
        last = layer == layout.depth - 1
        attends, valued = layer not in layout.skipping, layer in layout.tables
        self.adds_bigram = layer > 0  # layer 0's is in what enters it
        self.mix = Mix(cfg, len(layout.mixed), valued) if last and cfg.of("mudd") else None
        self.self_attn = Attention(cfg, layer, valued and self.mix is None) if attends else None
        self.mlp = MLP(cfg.d_model, cfg.hidden_width)
        static = self.mix is None
        self.rho = self.pi = self.skip_lambda = self.x0_lambdas = self.unet_lambda = None
        if static and cfg.of("resid_lambda_init") != OFF:
            self.rho = nn.Parameter(torch.empty(2 if attends else 1))
        if static and cfg.of("post_lambdas"):
            self.pi = nn.Parameter(torch.empty(2 if attends else 1))
        if layout.skip is not None and layout.skip[1] == layer:
            self.skip_lambda = nn.Parameter(torch.empty(()))
        if cfg.of("x0_inject") == "scalar":
            self.x0_lambdas = nn.Parameter(torch.empty(2))
        if cfg.of("unet_skips") and layer >= layout.depth - layout.depth // 2:
            self.unet_lambda = nn.Parameter(torch.empty(()))

    def forward(
        self,
        x: Tensor,
        given: Given,
        unet: Tensor | None,
        shared: Shared,
        cache: StateCache | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). `unet` (B, T, D): the state of the other half that it adds."""
        if unet is not None:
            assert self.unet_lambda is not None
            x = x + self.unet_lambda * unet
        if given.skip is not None:
            assert self.skip_lambda is not None
            x = x + torch.sigmoid(self.skip_lambda) * given.gates["skip"] * given.skip
        if self.x0_lambdas is not None:
            x = self.x0_lambdas[0] * x + self.x0_lambdas[1] * given.x0
        if self.mix is not None:
            return self._mixed(x, self.mix, given, shared, cache)
        if self.self_attn is not None:
            z = self._norm(x if given.late is None else given.late)
            branch = self.self_attn(z, given.value, None, given.gates, shared, cache)
            x = self._injected(self._added(x, branch, 0), given)
        return self._added(x, self.mlp(self._norm(x)), -1)

    def _mixed(self, x: Tensor, mix: Mix, given: Given, shared: Shared, cache: StateCache | None) -> Tensor:
        of, states = mix(x), (*given.mixed, x)
        added = _weighed(of["values"], states)
        if mix.valued:
            assert given.value is not None
            added = added + mix.table(of["value"], given.value)
        x = x + _weighed(of["states"], states)
        assert self.self_attn is not None
        z = self._norm(x if given.late is None else given.late)
        x = of["keep"][0] * x + of["post"][0] * self.self_attn(z, None, added, given.gates, shared, cache)
        if "x0" in of:
            x = x + of["x0"][0] * (given.mixed[0] if given.mixed else given.x0)
        if "bigram" in of and self.adds_bigram:
            x = x + of["bigram"][0] * given.bigram
        return of["keep"][1] * x + of["post"][1] * self.mlp(self._norm(x))

    def _norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, EPS, self.kernels)

    def _added(self, x: Tensor, branch: Tensor, part: int) -> Tensor:
        if self.rho is not None:
            x = self.rho[part] * x
        return x + (branch if self.pi is None else self.pi[part] * branch)

    def _injected(self, x: Tensor, given: Given) -> Tensor:
        if "x0" in given.gates:
            x = x + given.gates["x0"] * given.x0
        if "bigram" in given.gates and self.adds_bigram:
            assert given.bigram is not None
            x = x + given.gates["bigram"] * given.bigram
        return x

    @property
    def offsets_keys(self) -> bool:
        return self.self_attn is not None and self.self_attn.offset

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"rms_norm": {"columns": self.width}}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        if self.self_attn is not None:
            self.self_attn.init_weights(generator)
        self.mlp.init_weights(generator)
        if self.mix is not None:
            self.mix.mudd.init_weights(generator)
        for parameter, start in (
            (self.rho, self.start_of_rho),
            (self.pi, 1.0),
            (self.skip_lambda, SKIP_START),
            (self.unet_lambda, 1.0),
        ):
            if parameter is not None:
                parameter.fill_(start)
        if self.x0_lambdas is not None:
            self.x0_lambdas[0].fill_(1.0)
            self.x0_lambdas[1].fill_(0.0)
