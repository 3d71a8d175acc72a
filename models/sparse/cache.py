"""What native sparse attention keeps of a text (Yuan et al. 2025, section 3): a query reads of it the summaries, the
blocks that it selects, and the window, and nothing else."""

from __future__ import annotations

from models.layers.cache import KVCache, StateCache, WindowedKVCache
from models.sparse.blocks import capacity

__all__ = ["SparseCache"]


class SparseCache(StateCache):
    """Keys and values of all tokens, to select from; of the last `window`, for the window; of the last `size`, of which
    the next summary is made; and summaries, each made once, as soon as its block of `size` tokens is whole."""

    def __init__(self, n_layers: int, rows: int, window: int, size: int, stride: int) -> None:
        super().__init__(
            selected=KVCache(n_layers, rows),
            window=WindowedKVCache([window] * n_layers, rows),
            unsummed=WindowedKVCache([size] * n_layers, rows),
            summaries=KVCache(n_layers, rows),
        )
        self.size, self.stride = size, stride

    def blocks(self, tokens: int) -> int:
        """Summaries of a text of so many tokens."""
        return capacity(tokens, self.size, self.stride)

    def advance(self, tokens: int) -> None:
        further = self.blocks(self.length + tokens) - self.blocks(self.length)
        for name, part in self.parts.items():
            part.advance(further if name == "summaries" else tokens)
        super().advance(tokens)
