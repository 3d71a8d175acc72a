"""What a model keeps of the tokens it has seen, so that the next ones cost only themselves.

All rows of a cache have seen equally many tokens, each row one document from its start on. Rows of unequal length
are the decoder's business (`adapters/decoding.py`): a model needs no padding, no mask and no position of a row.

Shapes: B rows, G key/value heads, T tokens, h head width; R rows of which M tokens at most enter a layer, S keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "Cache",
    "Entering",
    "KVCache",
    "PartlyRaggedCache",
    "RaggedCache",
    "StateCache",
    "WindowedKVCache",
]


class Cache(Protocol):
    """What `generate` asks of any model's cache: made empty by `model.init_cache(rows)`, handed to the model's
    `forward` with the next tokens (B, T), T >= 1, and grown by it as far as these need."""

    @property
    def length(self) -> int:
        """Tokens that each row has seen."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, (M,) int64 on the model's device, in this order: finished ones are dropped."""

    def snapshot(self) -> Any:
        """The present state, for `restore`; cheap, so that tokens can be tried and taken back."""

    def restore(self, snapshot: Any) -> None:
        """Back to a state of the same rows from which this one was reached; a snapshot may be restored repeatedly."""


class KVCache:
    """Keys and values of `n_layers` layers. A forward pass appends its tokens in every layer, then calls `advance`
    once. Storage is made at the first tokens, in their dtype and on their device, and doubles when it is full."""

    def __init__(self, n_layers: int, rows: int) -> None:
        self.rows, self.length = rows, 0
        self._layers: list[Tensor | None] = [None] * n_layers  # each (2, B, G, capacity, h)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, h) behind what is there; returns all keys and values, (B, G, length + T, h)."""
        end = self.length + keys.shape[2]
        stored = self._with_room(layer, keys, end)
        stored[0, :, :, self.length : end] = keys
        stored[1, :, :, self.length : end] = values
        return stored[0, :, :, :end], stored[1, :, :, :end]

    def _with_room(self, layer: int, keys: Tensor, tokens: int) -> Tensor:
        batch, heads, _, width = keys.shape
        if batch != self.rows:
            raise ValueError(f"the cache was made for {self.rows} rows, got {batch}")
        stored = self._layers[layer]
        if stored is None or stored.shape[3] < tokens:
            capacity = 1 << (tokens - 1).bit_length()
            grown = keys.new_empty(2, batch, heads, capacity, width)
            if stored is not None:
                grown[:, :, :, : self.length] = stored[:, :, :, : self.length]
            self._layers[layer] = stored = grown
        return stored

    def advance(self, tokens: int) -> None:
        """Count `tokens` as seen, after every layer has appended them."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length

    def select(self, rows: Tensor) -> None:
        self.rows = len(rows)
        self._layers = [None if kept is None else kept.index_select(1, rows) for kept in self._layers]

    def snapshot(self) -> int:
        return self.length

    def restore(self, snapshot: int) -> None:
        self.truncate(snapshot)


class WindowedKVCache:
    """Keys and values of layers whose tokens see the last `windows[layer]` tokens, themselves included (None: all), and
    no more of them than that: what no later token can see is dropped. As `KVCache` otherwise."""

    def __init__(self, windows: Sequence[int | None], rows: int) -> None:
        self.windows, self.rows, self.length = list(windows), rows, 0
        self._layers: list[tuple[Tensor, int] | None] = [None] * len(self.windows)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, h); returns those that the first of these tokens sees, and all behind it: of a window of w,
        (B, G, min(length, w - 1) + T, h)."""
        end = self.length + keys.shape[2]
        first = self._first(layer)
        stored, start = self._with_room(layer, keys, first, end)
        stored[0, :, :, self.length - start : end - start] = keys
        stored[1, :, :, self.length - start : end - start] = values
        seen = stored[:, :, :, first - start : end - start]
        return seen[0], seen[1]

    def _first(self, layer: int) -> int:
        """The first token that the next one sees."""
        window = self.windows[layer]
        return 0 if window is None else max(0, self.length - (window - 1))

    def _with_room(self, layer: int, keys: Tensor, first: int, end: int) -> tuple[Tensor, int]:
        """The storage (2, B, G, capacity, h) and the token that its first entry is of. A full one is never shifted in
        place, so that a snapshot stays what it was."""
        batch, heads, _, width = keys.shape
        if batch != self.rows:
            raise ValueError(f"the cache was made for {self.rows} rows, got {batch}")
        held = self._layers[layer]
        if held is None or held[1] + held[0].shape[3] < end:
            grown = keys.new_empty(2, batch, heads, 1 << (end - first).bit_length(), width)
            if held is not None:
                stored, start = held
                grown[:, :, :, : self.length - first] = stored[:, :, :, first - start : self.length - start]
            self._layers[layer] = held = grown, first
        return held

    def advance(self, tokens: int) -> None:
        """Count `tokens` as seen, after every layer has appended them."""
        self.length += tokens

    def select(self, rows: Tensor) -> None:
        self.rows = len(rows)
        self._layers = [
            None if held is None else (held[0].index_select(1, rows), held[1]) for held in self._layers
        ]

    def snapshot(self) -> tuple[int, list[tuple[Tensor, int] | None]]:
        return self.length, list(self._layers)

    def restore(self, snapshot: tuple[int, list[tuple[Tensor, int] | None]]) -> None:
        self.length, layers = snapshot
        self._layers = list(layers)


class RaggedCache:
    """Keys and values of one layer that some tokens go around: of each row those that entered, and where they stood.

    Rows hold unequally many. How many is known on the host, as is who enters: the next pass computes only these.
    """

    def __init__(self, rows: int) -> None:
        self.counts = torch.zeros(rows, dtype=torch.int64)  # of each row, on the CPU
        self.positions = torch.zeros(rows, 0, dtype=torch.int64)  # (B, capacity), on the CPU
        self._stored: Tensor | None = None  # (2, B, G, capacity, h)

    def enter(self, entered: Tensor, past: int) -> Entering | None:
        """The tokens of a pass that enter: `entered` (B, T) bool, behind `past` tokens of every row. None if none does.
        Waits for the device."""
        entered = entered.cpu()
        return Entering(self, entered, past) if bool(entered.any()) else None

    def store(self, rows: Tensor, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Put keys and values (R, G, M, h) of tokens at `positions` into `slots`, (R, M) both, of `rows` (R,), all on
        the CPU. Returns what these rows hold up to the last slot, (2, R, G, S, h)."""
        end = int(slots.max()) + 1
        stored = self._with_room(keys, end)
        self.positions[rows[:, None], slots] = positions
        row, slot = (index.to(keys.device) for index in (rows, slots))
        both = torch.stack((keys, values)).permute(1, 3, 0, 2, 4)  # (R, M, 2, G, h)
        stored[:, row[:, None], :, slot] = both
        held = stored[:, :, :, :end]
        return held if len(rows) == len(self.counts) else held[:, row]

    def _with_room(self, keys: Tensor, tokens: int) -> Tensor:
        stored, (_, heads, _, width) = self._stored, keys.shape
        if stored is None or stored.shape[3] < tokens:
            capacity = 1 << (tokens - 1).bit_length()
            # Zeros: shorter rows have room behind their last, which is looked at with probability 0.
            grown = keys.new_zeros(2, len(self.counts), heads, capacity, width)
            positions = self.positions.new_zeros(len(self.counts), capacity)
            if stored is not None:
                grown[:, :, :, : stored.shape[3]] = stored
                positions[:, : stored.shape[3]] = self.positions
            self._stored, self.positions = grown, positions
            return grown
        return stored

    def truncate(self, length: int) -> None:
        """Forget what stood at position `length` or behind it."""
        slot = torch.arange(self.positions.shape[1])
        self.counts = ((self.positions < length) & (slot < self.counts[:, None])).sum(1)

    def select(self, rows: Tensor) -> None:
        here = rows.cpu()
        self.counts, self.positions = self.counts[here], self.positions[here]
        self._stored = None if self._stored is None else self._stored.index_select(1, rows)


class Entering:
    """The tokens of one pass that enter a layer, those of a row side by side: R rows that have any, M of one at most.
    Shorter rows repeat their last token, in slots that the next pass writes anew.

    `places` (R, M): of each among the T tokens of the pass; `flat` (R M,): the same among all B T; `real` (N,): which
    of these R M are no repetitions. On the CPU.
    """

    def __init__(self, cache: RaggedCache, entered: Tensor, past: int) -> None:
        self.cache, self.past = cache, past
        numbers = entered.sum(1)  # (B,)
        self.rows = numbers.nonzero()[:, 0]  # (R,)
        here, numbers = entered[self.rows], numbers[self.rows, None]
        order = torch.arange(int(numbers.max())).expand(len(self.rows), -1)  # (R, M)
        # Who enters comes first, in the order of the text.
        first = here.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        self.places = first.gather(1, order.minimum(numbers - 1))
        self.flat = (self.rows[:, None] * entered.shape[1] + self.places).flatten()
        self.real = (order < numbers).flatten().nonzero()[:, 0]
        self.slots = cache.counts[self.rows, None] + order  # (R, M)

    @property
    def keys(self) -> int:
        """S: those that the fullest row holds, the new ones among them."""
        return int(self.slots.max()) + 1

    def seen(self, window: int | None = None) -> Tensor:
        """(R, 1, M, S) bool: a token sees itself and those of its row that entered before it; of a window, those among
        the last `window` positions of the text, its own included."""
        slot = torch.arange(self.keys)
        seen = slot <= self.slots[..., None]  # (R, M, S)
        if window is not None:
            held = torch.zeros(len(self.rows), self.keys, dtype=torch.int64)
            known = self.cache.positions[self.rows, : self.keys]
            held[:, : known.shape[1]] = known
            held.scatter_(1, self.slots, self.past + self.places)
            seen &= (self.past + self.places)[..., None] - held[:, None] < window
        return seen[:, None]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.append`, of these tokens: (R, G, M, h) -> (R, G, S, h). Counts those that are no repetitions."""
        held = self.cache.store(self.rows, self.slots, self.past + self.places, keys, values)
        numbers = torch.zeros_like(self.cache.counts)
        row = (self.real // self.slots.shape[1]).bincount(minlength=len(self.rows))
        numbers[self.rows] = row
        self.cache.counts = self.cache.counts + numbers
        return held[0], held[1]


class PartlyRaggedCache(KVCache):
    """Of a stack of which some layers, `ragged`, hold only the tokens that entered them (`RaggedCache`)."""

    def __init__(self, n_layers: int, rows: int, ragged: Iterable[int]) -> None:
        super().__init__(n_layers, rows)
        self.ragged = {layer: RaggedCache(rows) for layer in ragged}

    def truncate(self, length: int) -> None:
        super().truncate(length)
        for layer in self.ragged.values():
            layer.truncate(length)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        for layer in self.ragged.values():
            layer.select(rows)


class StateCache:
    """Named parts of a model that keeps more than keys and values: states, tensors with rows along dim 0, and caches.

        cache = StateCache(recent=torch.zeros(rows, width), attention=KVCache(n_layers, rows))

    A forward pass replaces a state (`cache["recent"] = new`) and never writes into one: that makes a snapshot free. It
    calls `advance` once, and that of each inner cache by as many tokens as that one has seen.
    """

    def __init__(self, **parts: Any) -> None:
        self.parts: dict[str, Any] = parts
        self.length = 0

    def __getitem__(self, name: str) -> Any:
        return self.parts[name]

    def __setitem__(self, name: str, part: Any) -> None:
        self.parts[name] = part

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def select(self, rows: Tensor) -> None:
        for name, part in self.parts.items():
            if isinstance(part, Tensor):
                self.parts[name] = part.index_select(0, rows)
            else:
                part.select(rows)

    def snapshot(self) -> tuple[int, dict[str, Any]]:
        return self.length, {
            name: part if isinstance(part, Tensor) else part.snapshot() for name, part in self.parts.items()
        }

    def restore(self, snapshot: tuple[int, dict[str, Any]]) -> None:
        self.length, kept = snapshot
        for name, part in kept.items():
            if isinstance(part, Tensor):
                self.parts[name] = part
            else:
                self.parts[name].restore(part)
