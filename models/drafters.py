"""What models with several predictions at each position draft with (`models/layers/drafter.py`).

Shapes: B rows, T tokens just read, D width, V vocabulary, W positions that modules run over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.layers.cache import KVCache
from models.layers.decoder import further
from models.layers.drafter import states_at

if TYPE_CHECKING:
    from models.mtm import MTM
    from models.mtp import MTP

__all__ = ["HeadDrafter", "ModuleDrafter"]


class HeadDrafter:
    """Heads that read the trunk side by side have drafted when a pass is over (Gloeckle et al. 2024, section 2): the
    pass that verifies the last drafts makes the next ones. Each head's block keeps its own keys."""

    def __init__(self, model: MTP, rows: int, drafts: int) -> None:
        self.model, self.drafts = model, drafts
        self.cache = model.init_cache(rows)
        self.heads: list[Tensor] = []  # states (B, T, D) of the further heads

    @property
    def length(self) -> int:
        return self.cache.length

    def read(self, tokens: Tensor) -> Tensor:
        # How many heads run is as many tokens ahead as are given; none of them is read.
        hidden = self.model(tokens, cache=self.cache, ahead=[tokens] * self.drafts)
        self.heads = [hidden.extra[further(k)] for k in range(2, 2 + self.drafts)]
        return hidden.states

    def draft(self, depth: int, tokens: Tensor, at: Tensor) -> Tensor:
        return self.model.logits(states_at(self.heads[depth - 1], at))

    def forget(self, length: int) -> None:
        self.cache.truncate(length)

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)


class ModuleDrafter:
    """Modules behind the trunk draft in turn, each from the one before it and the draft before its own.

    Module k needs at position i the token at i + k. Of n tokens that are kept and the one behind them, which is known
    too, the last module has the first n + 1 - drafts positions for good; so many are kept of all modules, and what they
    need to make the others again: the trunk's states and the tokens there, the tail. Positions that a module made of a
    draft are made anew, whether that was accepted or not.
    """

    def __init__(self, model: MTM, rows: int, drafts: int) -> None:
        self.model, self.drafts = model, drafts
        self.trunk = model.init_cache(rows)
        # Places in a cache are numbered through the trunk's blocks and on through the modules'.
        self.modules = KVCache(model.cfg.n_layers + drafts, rows)
        self.tail: tuple[Tensor, Tensor] | None = None  # tokens (B, <drafts), states (B, <drafts, D)
        self.hidden = self.deeper = self.tokens = torch.empty(0)  # of this round

    @property
    def length(self) -> int:
        return self.trunk.length

    def read(self, tokens: Tensor) -> Tensor:
        states, hidden, _, _ = self.model.run_trunk(tokens, cache=self.trunk)
        self.hidden = self._behind_tail(1, hidden)  # (B, W, D)
        return states

    def draft(self, depth: int, tokens: Tensor, at: Tensor) -> Tensor:
        width = self.hidden.shape[1]
        self.tokens = self._behind_tail(0, tokens)  # (B, W + drafts)
        following = self.tokens[:, depth : depth + width]
        shared = self.model.trunk.shared(following, self.modules.length, None)
        module = self.model.mtp_modules[depth - 1]
        before = self.hidden if depth == 1 else self.deeper
        self.deeper, _ = module(before, self.model.embedded(following), shared, self.modules)
        behind = 0 if self.tail is None else self.tail[0].shape[1]
        return self.model.logits(self.model.head_states(module, states_at(self.deeper, behind + at)))

    def forget(self, length: int) -> None:
        self.trunk.truncate(length)
        first, sure = self.modules.length, max(0, length + 1 - self.drafts)
        self.modules.advance(sure - first)
        tail = slice(sure - first, length - first)
        self.tail = self.tokens[:, tail], self.hidden[:, tail]

    def select(self, rows: Tensor) -> None:
        self.trunk.select(rows)
        self.modules.select(rows)
        if self.tail is not None:
            self.tail = self.tail[0][rows], self.tail[1][rows]

    def _behind_tail(self, part: int, new: Tensor) -> Tensor:
        return new if self.tail is None else torch.cat((self.tail[part], new), 1)
