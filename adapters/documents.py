"""What a model is told of the documents that its rows hold: ids, and offsets if it asks for them.

Shapes: B rows, L positions, N documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data.offsets import document_offsets

__all__ = ["documents", "documents_among"]


def documents(model: Any, doc_ids: Tensor | None) -> dict[str, Tensor]:
    """Arguments of `model` for ids (B, L) on the CPU: `doc_ids`, and `cu_seqlens` (N + 1,) if `forward` has that."""
    if doc_ids is None:
        return {}
    found = {"doc_ids": doc_ids}
    if "cu_seqlens" in inspect.signature(model.forward).parameters:
        found["cu_seqlens"] = torch.from_numpy(document_offsets(doc_ids.numpy()))
    return found


def documents_among(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those arguments again, among the tensors of a prepared batch."""
    return {name: tensors[name] for name in ("doc_ids", "cu_seqlens") if name in tensors}
