"""Where the bytes of a row stand in its patches: every document begins a patch, and fills its last one up.

Shapes: B rows, S bytes, P bytes of a patch, K patches, L = K P places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.decoder import document_positions

__all__ = ["Layout"]

EMPTY = -1


@dataclass(frozen=True)
class Layout:
    """`source` (B, L): which byte of its row stands at a place; `positions` (B, L): the byte's position in its
    document, `EMPTY` where no byte stands; `documents` (B, K): of which document of its row a patch is, `EMPTY` behind
    the last; `places` (B, S): where each byte stands. `offset`: so many places are left empty in front of each
    document. `cu_seqlens` (N + 1,): the patches at which documents begin, as offsets (data/offsets.py).
    """

    source: Tensor
    positions: Tensor
    documents: Tensor
    places: Tensor
    offset: int = 0
    cu_seqlens: Tensor | None = None

    @property
    def patches(self) -> int:
        """K"""
        return self.documents.shape[1]

    @classmethod
    def of(cls, doc_ids: Tensor, patch: int, offset: int = 0) -> Layout:
        """Of documents (B, S), any integers on the CPU; a change begins a document, and so does a row.

        K is what S bytes take, and room for what documents leave empty: it is 0, or a power of two that suffices, so
        that there are few shapes.
        """
        rows, length = doc_ids.shape
        positions = document_positions(doc_ids)  # (B, S)
        starts = positions == 0
        filled = torch.where(
            starts[:, 1:], -(-(offset + positions[:, :-1] + 1) // patch), 0
        )  # by the one before
        first = F.pad(filled, (1, 0)).cumsum(1)  # patch that a byte's document begins with
        places = first * patch + offset + positions
        usual = -(-(length + offset) // patch)
        more = int(places[:, -1].max()) // patch + 1 - usual
        total = usual + (1 << (more - 1).bit_length() if more else 0)
        source = torch.zeros(rows, total * patch, dtype=torch.int64)
        source.scatter_(1, places, torch.arange(length).expand(rows, -1))
        placed = torch.full_like(source, EMPTY).scatter_(1, places, positions)
        documents = torch.full((rows, total), EMPTY, dtype=torch.int64)
        documents.scatter_(1, places // patch, starts.cumsum(1) - 1)
        return cls(source, placed, documents, places, offset)

    @classmethod
    def of_one(cls, tokens: Tensor, patch: int) -> Layout:
        """Of tokens (B, S) whose rows are one document each."""
        (rows, length), device = tokens.shape, tokens.device
        total = -(-length // patch)
        index = torch.arange(total * patch, device=device)
        positions = torch.where(index < length, index, EMPTY).expand(rows, -1)
        documents = torch.zeros(rows, total, dtype=torch.int64, device=device)
        source = index.clamp(max=length - 1).expand(rows, -1)
        return cls(source, positions, documents, index[:length].expand(rows, -1))
