"""What a model offers that drafts tokens for itself to verify: self-speculative decoding (`adapters/speculative.py`).

Such a model has `max_drafts`, how many tokens behind the next one it can draft at most (0: none, as it is configured;
then `no_drafts`, if it has that, says why), and `init_drafter(rows, drafts)`, which makes a `Drafter` of its caches.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from models.layers.decoder import Hidden

__all__ = ["Drafter", "states_at"]


class Drafter(Protocol):
    """The caches of a model and of what it drafts with, of rows that have all been read equally far.

    A round of decoding is `read`, then `draft` for each depth in turn, from 1 to the number that the drafter was made
    for (whether anybody wants these drafts or not: so nothing that is kept ever has a hole), then `forget`.
    """

    @property
    def length(self) -> int:
        """Tokens of each row that are kept."""

    def read(self, tokens: Tensor) -> Tensor | Hidden:
        """Read tokens (B, T) behind what is kept; states (B, T, D), of which `model.logits` says what comes next at
        each; or a `Hidden` with what else is told of this pass."""

    def draft(self, depth: int, tokens: Tensor, at: Tensor) -> Tensor:
        """Logits (B, V) of the draft at this depth: of the token `depth` places behind the one that follows the
        position at[b], (B,), of the T tokens just read. tokens (B, T + drafts): those that were read or what has been
        found to stand in their places, the one that follows at[b], and the drafts of smaller depths; what stands
        behind these means nothing and must change nothing. A row of which no draft is wanted is `at` the place of one
        of which some are; if none are wanted of any, all are at the last token read."""

    def forget(self, length: int) -> None:
        """Keep the first `length` tokens, no fewer than before the last `read`: of these all stood in `tokens`, as did
        the next one."""

    def select(self, rows: Tensor) -> None:
        """As `Cache.select`."""


def states_at(states: Tensor, at: Tensor) -> Tensor:
    """Of states (B, T, D) those at one position of each row, (B,) -> (B, D)."""
    return states[torch.arange(len(at), device=at.device), at]
