"""Adapter of models whose attention selects blocks: as the default one, and shows what was selected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from adapters.base import Annotation, Context, Map, ModelAdapter
from adapters.default import DefaultModelAdapter
from models.sparse.mixer import Layout, Ranking

__all__ = ["SparseAdapter", "rankings", "selected"]


class SparseAdapter(DefaultModelAdapter):
    def annotate(self, text: str | bytes) -> Annotation:
        """Of each layer and group: the blocks of keys that the tokens selected, queries by blocks."""
        with rankings(self) as found:
            self.clean_states(self.one_row(text), Context(seed=0, step=0, phase="eval", rows_in_step=1))
        size = self.model_cfg.selection_block_size
        return Annotation(
            maps=tuple(
                Map(
                    f"layer {layer}, group {group}: selected blocks",
                    selected(starts[:, group], size),
                    "query",
                    f"block of {size} keys",
                    column_labels=tuple(
                        f"{max(0, block * size - 1)}" for block in range(-(-len(starts) // size))
                    ),
                )
                for layer, starts in enumerate(found)
                for group in range(starts.shape[1])
                if len(starts) > 1
            )
        )


@contextmanager
def rankings(adapter: ModelAdapter) -> Iterator[list[Tensor]]:
    """Of each layer that ranks blocks, in the order in which they run, what it selects for the first row, which is one
    document: where blocks begin, (1 + L, G, n)."""
    found: list[Tensor] = []

    def look(ranking: Ranking, given: tuple[Tensor, Tensor, Layout], starts: Tensor) -> None:
        # Places of a hierarchy that hold nothing stand behind the document, as one of their own.
        found.append(starts[0][given[2].begin[0] == 0])

    handles = [
        module.register_forward_hook(look)
        for path in adapter.blocks()
        for module in adapter.model.get_submodule(path).modules()
        if isinstance(module, Ranking)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def selected(starts: Tensor, size: int) -> Tensor:
    """starts (1 + L, n) of a document, the start token its first -> (L, blocks): 1 where a token selected one."""
    blocks = -(-len(starts) // size)
    marks = torch.zeros(len(starts), blocks + 1)
    marks.scatter_(1, torch.where(starts < 0, blocks, starts // size).long().cpu(), 1.0)
    return marks[1:, :blocks]
