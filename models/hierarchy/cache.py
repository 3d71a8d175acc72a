"""What a hierarchy keeps of the bytes of rows, which have seen equally many bytes, and unequally many chunks.

Shapes: B rows of the cache, R of them that a pass is of, C new places of each, S places held at most, H heads, h width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["HierarchyCache", "RowsOf"]


class HierarchyCache:
    """A `models.layers.cache.Cache`. `states`: by name, rows along dim 0; a pass replaces them and never writes into
    one. `counts`: of each stack with attention, the places that each row holds, (B,) int64 on the CPU. Keys and values
    are made at the first ones, in their dtype and on their device; what stands behind a row's count means nothing."""

    def __init__(self, rows: int, states: dict[str, Tensor], counts: dict[str, Tensor]) -> None:
        self.rows, self.length = rows, 0
        self.states, self.counts = states, counts
        self._stored: dict[str, Tensor] = {}  # each (2, B, H, capacity, h)

    def all_rows(self, device: torch.device) -> RowsOf:
        everything = torch.arange(self.rows)
        return RowsOf(self, everything, everything.to(device))

    def store(
        self, name: str, at: RowsOf, slots: Tensor, keys: Tensor, values: Tensor, held: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Put keys and values (R, H, C, h) into slots (R, C) int64 on the CPU; returns what these rows hold up to the
        last slot, (R, H, S, h) each. `held`: S, of rows that hold equally many and may get none."""
        held = int(slots.max()) + 1 if held is None else held
        if not held:
            return keys, values
        stored, row, slot = self._with_room(name, keys, held), at.rows, slots.to(keys.device)
        stored[:, row[:, None], :, slot] = torch.stack((keys, values)).permute(1, 3, 0, 2, 4)
        found = stored[:, row, :, :held]
        return found[0], found[1]

    def _with_room(self, name: str, keys: Tensor, places: int) -> Tensor:
        _, heads, _, width = keys.shape
        stored = self._stored.get(name)
        if stored is None or stored.shape[3] < places:
            # Zeros: shorter rows have room behind their last, which is looked at with probability 0.
            grown = keys.new_zeros(2, self.rows, heads, 1 << (places - 1).bit_length(), width)
            if stored is not None:
                grown[:, :, :, : stored.shape[3]] = stored
            self._stored[name] = stored = grown
        return stored

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def select(self, rows: Tensor) -> None:
        here, self.rows = rows.cpu(), len(rows)
        self.states = {name: state.index_select(0, rows) for name, state in self.states.items()}
        self.counts = {name: counts[here] for name, counts in self.counts.items()}
        self._stored = {name: kept.index_select(1, rows) for name, kept in self._stored.items()}

    def snapshot(self) -> Any:
        return self.length, dict(self.states), dict(self.counts)

    def restore(self, snapshot: Any) -> None:
        self.length, states, counts = snapshot
        self.states, self.counts = dict(states), dict(counts)


@dataclass(frozen=True)
class RowsOf:
    """Some rows of a cache: `here` (R,) on the CPU, `rows` the same on its device."""

    cache: HierarchyCache
    here: Tensor
    rows: Tensor

    def among(self, chosen: Tensor) -> RowsOf:
        """Of these the `chosen`, (R',) int64 on the CPU."""
        return RowsOf(self.cache, self.here[chosen], self.rows[chosen.to(self.rows.device)])

    def read(self, name: str) -> Tensor:
        return self.cache.states[name].index_select(0, self.rows)

    def write(self, name: str, state: Tensor) -> None:
        kept = self.cache.states[name]
        self.cache.states[name] = kept.index_copy(0, self.rows, state.to(kept.dtype))

    def slots(self, name: str, new: int) -> Tensor:
        """(R, `new`) int64 on the CPU: where the next places of each row go, which count from now on."""
        counts = self.cache.counts[name].clone()
        first = counts[self.here]
        counts[self.here] = first + new
        self.cache.counts[name] = counts
        return first[:, None] + torch.arange(new)
