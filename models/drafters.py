"""What models draft with that predict several tokens at each position, or can compute less
(`models/layers/drafter.py`).

Shapes: B rows, T tokens just read, D width, V vocabulary, W positions that modules run over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.layers.cache import KVCache
from models.layers.decoder import Hidden, further
from models.layers.drafter import states_at
from models.reading import DRAFTED, read_together

if TYPE_CHECKING:
    from models.mtm import MTM
    from models.mtp import MTP
    from models.rd import RD

__all__ = ["DepthDrafter", "HeadDrafter", "ModuleDrafter"]


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


class DepthDrafter:
    """A model of recurrent depth drafts as it would write if its core ran less often (Geiping et al. 2025, section
    6).

    What the core keeps of its first recurrences does not depend on whether others follow, so a token that was read at
    full depth need not be read anew. The coda has read another state by then: it keeps entries of its own for drafts,
    made in the pass that reads a token. A draft is one token through few recurrences; where rows do not stand at the
    same place, so many more of those that are ahead.
    """

    def __init__(self, model: RD, rows: int) -> None:
        self.model, self.depth = model, model.cfg.draft_depth
        self.cache = model.init_cache(rows, drafting=True)
        self.length = 0

    def read(self, tokens: Tensor) -> Hidden:
        return read_together(
            self.model, tokens, self.cache, depth=self.model.cfg.eval_depth, drafts_from=self.depth
        )

    def draft(self, depth: int, tokens: Tensor, at: Tensor) -> Tensor:
        new = at + depth  # the last token of each row that is known
        first, last = int(new.min()), int(new.max())
        self.cache.truncate(self.length + first)
        known = tokens[:, first : last + 1]
        hidden = read_together(self.model, known, self.cache, depth=self.depth, ends=DRAFTED)
        return self.model.logits(states_at(hidden.states, new - first))

    def forget(self, length: int) -> None:
        self.cache.truncate(length)
        self.length = length

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
