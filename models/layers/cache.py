"""Keys and values of the tokens seen so far.

Shapes: B rows, G key/value heads, S tokens, h head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KVCache"]


class KVCache:
    """Fixed-size storage for `n_layers` layers. A forward pass appends its tokens in every layer, then calls
    `advance` once. All rows are one document each and equally long."""

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_kv_heads: int,
        max_len: int,
        head_width: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """`dtype` None: that of the first keys."""
        self.shape = (n_layers, 2, batch, n_kv_heads, max_len, head_width)
        self.device, self.dtype = device, dtype
        self.length = 0
        self.max_len = max_len
        self._storage: Tensor | None = None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, h) behind what is there; returns all keys and values, (B, G, length + T, h)."""
        if self._storage is None:
            self._storage = torch.empty(self.shape, device=self.device, dtype=self.dtype or keys.dtype)
        batch, tokens = keys.shape[0], keys.shape[2]
        if batch != self.shape[2]:
            raise ValueError(f"the cache was made for {self.shape[2]} rows, got {batch}")
        end = self.length + tokens
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens; {self.length} + {tokens} do not fit")
        stored = self._storage[layer]
        stored[0, :, :, self.length : end] = keys
        stored[1, :, :, self.length : end] = values
        return stored[0, :, :, :end].to(keys.dtype), stored[1, :, :, :end].to(values.dtype)

    def advance(self, tokens: int) -> None:
        """Count `tokens` as seen, after every layer has appended them."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length
