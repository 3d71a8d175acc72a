"""Next-byte prediction by models that read patches: every document begins one.

Shapes: B rows, S positions, K patches, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapters.base import Context, Prepared, StepOutput
from adapters.default import DefaultModelAdapter
from data.offsets import document_offsets
from models.layers.decoder import Hidden
from models.patches.layout import Layout

if TYPE_CHECKING:
    from data.rows import Batch

__all__ = ["PatchAdapter"]

WHOLE, STRIDED = "whole", "strided"  # passes over a row: from its first place, and half a patch later
PARTS = ("source", "positions", "documents", "places", "cu_seqlens")


class PatchAdapter(DefaultModelAdapter):
    """The patches of a row are laid out in `prepare`: what documents leave empty of their last ones is computed, and
    counted as operations, and is part of no loss and no score. Positions stay where they are."""

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        prepared = super().prepare(batch, ctx)
        doc_ids = prepared.tensors.pop("doc_ids")
        patch = self.model_cfg.patch_size
        prepared.tensors |= _tensors(WHOLE, Layout.of(doc_ids, patch))
        if ctx.phase == "eval" and self.model_cfg.strided_inference:
            prepared.tensors |= _tensors(STRIDED, Layout.of(doc_ids, patch, patch // 2))
        return prepared

    def hidden(self, prepared: Prepared) -> Hidden:
        """Of two passes, half a patch apart, every position is of the one in which it stands in the first half of its
        patch (section 2.3.3)."""
        t, patch = prepared.tensors, self.model_cfg.patch_size
        states = self._pass(t, WHOLE)
        if f"{STRIDED}_places" in t:
            late = t[f"{WHOLE}_places"] % patch >= patch // 2  # (B, S)
            states = torch.where(late[..., None], self._pass(t, STRIDED, patch // 2), states)
        return Hidden(states)

    def _pass(self, tensors: dict[str, Tensor], name: str, offset: int = 0) -> Tensor:
        parts: dict[str, Any] = {part: tensors[f"{name}_{part}"] for part in PARTS}
        return self.model(tensors["inputs"], layout=Layout(**parts, offset=offset))

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        output = super().step_output(hidden, prepared)
        rows, patches = prepared.tensors[f"{WHOLE}_documents"].shape
        of_row = self.model.flops_of_row(patches, prepared.tensors["inputs"].shape[1])
        output.flops = rows * of_row.training_per_token
        return output

    @property
    def width(self) -> int:
        return self.model_cfg.d_global


def _tensors(name: str, layout: Layout) -> dict[str, Tensor]:
    """What a prepared batch carries of a layout."""
    offsets = torch.from_numpy(document_offsets(layout.documents.numpy()))
    whole = replace(layout, cu_seqlens=offsets)
    return {f"{name}_{part}": getattr(whole, part) for part in PARTS}
