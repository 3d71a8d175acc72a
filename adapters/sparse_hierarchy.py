"""Adapter of hierarchies with sparse attention: as that of hierarchies, and shows which chunks were selected too."""

from __future__ import annotations

from adapters.base import Annotation, Map
from adapters.hierarchy import HierarchyAdapter
from adapters.sparse import rankings, selected
from models.hierarchy.sparse import ChunkAttention

__all__ = ["SparseHierarchyAdapter"]


class SparseHierarchyAdapter(HierarchyAdapter):
    def annotate(self, text: str | bytes) -> Annotation:
        """The chunks of each stage, in bytes; of each sparse layer and group the blocks of chunks that chunks selected,
        in the outermost stage those of bytes. The first of all begins with the start token."""
        with rankings(self) as found:
            spans = super().annotate(text).spans
        size = self.model_cfg.selection_block_size
        maps = tuple(
            Map(
                f"sparse layer {layer}, group {group}: selected blocks",
                selected(starts[:, group], size),
                unit,
                f"block of {size} {unit}s",
                row_labels=tuple(map(str, range(1, len(starts)))),
                column_labels=tuple(str(block * size) for block in range(-(-len(starts) // size))),
            )
            for layer, (unit, starts) in enumerate(zip(self._units(), found, strict=True))
            for group in range(starts.shape[1])
            if len(starts) > 1
        )
        return Annotation(spans, maps)

    def _units(self) -> list[str]:
        """Of each sparse layer, in the order in which they run: what its positions count."""
        mixers = [self.model.get_submodule(path).mixer for path in self.blocks()]
        return [
            "byte" if mixer.name.startswith("0.") else "chunk"
            for mixer in mixers
            if isinstance(mixer, ChunkAttention)
        ]
