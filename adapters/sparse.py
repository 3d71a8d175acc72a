"""Adapter of models whose attention selects blocks: as the default one, and shows what was selected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapters.base import Annotation, Context, Map
from adapters.default import DefaultModelAdapter
from models.sparse.mixer import Ranking

__all__ = ["SparseAdapter"]


class SparseAdapter(DefaultModelAdapter):
    def annotate(self, text: str | bytes) -> Annotation:
        """Of each layer and group: the blocks of keys that the tokens selected, queries by blocks."""
        found: dict[int, Tensor] = {}
        handles = []
        for layer, path in enumerate(self.blocks()):
            for module in self.model.get_submodule(path).modules():
                if isinstance(module, Ranking):

                    def keep(ranking: Any, given: Any, starts: Tensor, layer: int = layer) -> None:
                        found[layer] = starts[0]  # (1 + L, G, n)

                    handles.append(module.register_forward_hook(keep))
        try:
            self.clean_states(self.one_row(text), Context(seed=0, step=0, phase="eval", rows_in_step=1))
        finally:
            for handle in handles:
                handle.remove()
        size = self.model_cfg.selection_block_size
        return Annotation(
            maps=tuple(
                Map(
                    f"layer {layer}, group {group}: selected blocks",
                    _selected(starts[:, group], size),
                    "query",
                    f"block of {size} keys",
                    column_labels=tuple(
                        f"{max(0, block * size - 1)}" for block in range(-(-len(starts) // size))
                    ),
                )
                for layer, starts in found.items()
                for group in range(starts.shape[1])
                if len(starts) > 1
            )
        )


def _selected(starts: Tensor, size: int) -> Tensor:
    """starts (1 + L, n) of a document, the start token its first -> (L, blocks): 1 where a token selected one."""
    blocks = -(-len(starts) // size)
    marks = torch.zeros(len(starts), blocks + 1)
    marks.scatter_(1, torch.where(starts < 0, blocks, starts // size).long().cpu(), 1.0)
    return marks[1:, :blocks]
