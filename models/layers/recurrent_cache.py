"""Keys and values of blocks that run several times over the same tokens, each time with entries of its own.

    cache = RecurrentCache(slots=[1, 4, 4, 1], rows=B)  # blocks 1 and 2 run up to four times
    x = block(x, ..., cache.turn(i))                     # the (i + 1)-th time
    cache.close(...); cache.advance(T)                   # when these tokens are done

A turn i of a block looks at what each earlier token left in its turn i, and at the last that it left where it had fewer
turns (Geiping et al. 2025, arXiv:2502.05171, section 6). With fewer slots than turns, turn i reads and
writes slot i mod slots.

Shapes: B rows, R of them that a turn is of, T new tokens, S all tokens, G key/value heads, h head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RecurrentCache", "Turn"]


class RecurrentCache:
    """`slots`: how many entries of a token each block keeps. A `models.layers.cache.Cache`; storage is made at the
    first tokens, in their dtype and on their device, and doubles when it is full."""

    def __init__(self, slots: Sequence[int], rows: int) -> None:
        self.slots, self.rows, self.length = list(slots), rows, 0
        self._stored: list[Tensor | None] = [None] * len(self.slots)  # each (slots, 2, B, G, capacity, h)
        self.carried: list[
            Tensor
        ] = []  # of a model that carries a state from token to token: behind each, (B, D)

    def turn(self, number: int = 0, rows: Tensor | None = None, running: Tensor | None = None) -> Turn:
        """What blocks are handed as their cache in this turn, from 0. `rows` (R,): of these rows alone; `running`
        (R, T): of these tokens, while the others have left: they stand as they did in the turn before."""
        return Turn(self, number, rows, running)

    def append(self, layer: int, keys: Tensor, values: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """Store (R, G, T, h) behind what is there; returns all keys and values, (R, G, length + T, h)."""
        begin, end = self.length, self.length + keys.shape[2]
        stored = self._with_room(layer, keys, end)
        rows = slice(None) if turn.rows is None else turn.rows
        pair = torch.stack((keys, values))  # (2, R, G, T, h)
        if turn.running is not None:
            before = stored[(turn.number - 1) % self.slots[layer]][:, rows, :, begin:end]
            pair = torch.where(turn.running[:, None, :, None], pair, before)
        here = stored[turn.number % self.slots[layer]]
        here[:, rows, :, begin:end] = pair
        found = here[:, rows, :, :end]
        return found[0], found[1]

    def _with_room(self, layer: int, keys: Tensor, tokens: int) -> Tensor:
        batch, heads, _, width = keys.shape
        if batch > self.rows:
            raise ValueError(f"the cache was made for {self.rows} rows, got {batch}")
        stored = self._stored[layer]
        if stored is None or stored.shape[4] < tokens:
            capacity = 1 << (tokens - 1).bit_length()
            grown = keys.new_empty(self.slots[layer], 2, self.rows, heads, capacity, width)
            if stored is not None:
                grown[..., : self.length, :] = stored[..., : self.length, :]
            self._stored[layer] = stored = grown
        return stored

    def close(self, layers: Iterable[int], depths: Tensor) -> None:
        """Leave no holes: the tokens just appended to, which took `depths` (B, T) turns, stand in all further turns of
        these blocks as they did in their last."""
        begin, end = self.length, self.length + depths.shape[1]
        for layer in layers:
            stored = self._stored[layer]
            assert stored is not None, "nothing was appended"
            new = stored[..., begin:end, :]  # (slots, 2, B, G, T, h)
            slot = torch.arange(len(new), device=depths.device)[:, None, None]
            last = torch.minimum(slot, depths - 1)[:, None, :, None, :, None]  # (slots, 1, B, 1, T, 1)
            new.copy_(new.gather(0, last.expand_as(new)))

    def advance(self, tokens: int) -> None:
        """Count `tokens` as seen, after every block has appended them."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens, in every turn of every block."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length
        del self.carried[length:]

    def select(self, rows: Tensor) -> None:
        self.rows = len(rows)
        self.carried = [state[rows] for state in self.carried]
        self._stored = [None if kept is None else kept.index_select(2, rows) for kept in self._stored]

    def snapshot(self) -> int:
        return self.length

    def restore(self, snapshot: int) -> None:
        self.truncate(snapshot)


@dataclass(frozen=True)
class Turn:
    """See `RecurrentCache.turn`."""

    cache: RecurrentCache
    number: int
    rows: Tensor | None
    running: Tensor | None

    @property
    def length(self) -> int:
        return self.cache.length

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.append(layer, keys, values, self)
