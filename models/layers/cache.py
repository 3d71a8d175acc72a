"""What a model keeps of the tokens it has seen, so that the next ones cost only themselves.

All rows of a cache have seen equally many tokens, each row one document from its start on. Rows of unequal length
are the decoder's business (`adapters/decoding.py`): a model needs no padding, no mask and no position of a row.

Shapes: B rows, G key/value heads, T tokens, h head width.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

__all__ = ["Cache", "KVCache", "StateCache"]


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
