"""Adapter of hierarchies with sparse attention: as that of hierarchies, and shows which chunks were selected too."""

from __future__ import annotations

from adapters.base import Annotation, Map
from adapters.hierarchy import HierarchyAdapter
from adapters.sparse import rankings, selected

__all__ = ["SparseHierarchyAdapter"]


class SparseHierarchyAdapter(HierarchyAdapter):
    def annotate(self, text: str | bytes) -> Annotation:
        """The chunks of each stage, in bytes; of each sparse layer and group the blocks of chunks that chunks selected.
        The first chunk begins with the start token."""
        with rankings(self) as found:
            spans = super().annotate(text).spans
        size = self.model_cfg.selection_block_size
        maps = tuple(
            Map(
                f"sparse layer {layer}, group {group}: selected blocks",
                selected(starts[:, group], size),
                "chunk",
                f"block of {size} chunks",
                row_labels=tuple(map(str, range(1, len(starts)))),
                column_labels=tuple(str(block * size) for block in range(-(-len(starts) // size))),
            )
            for layer, starts in enumerate(found)
            for group in range(starts.shape[1])
            if len(starts) > 1
        )
        return Annotation(spans, maps)
