"""Which tokens of a row belong to one document, for operations that carry something from token to token. Tokens of one
number are neighbours; an id that comes again later is another document."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["begins", "runs"]


def begins(doc_ids: Tensor) -> Tensor:
    """doc_ids (B, T), any integers -> (B, T) bool: where a document begins behind another. The first token of a row
    is none: what came before it belongs to its document."""
    return F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0))


def runs(doc_ids: Tensor) -> Tensor:
    """doc_ids (B, T), any integers -> (B, T) int64: how many changes of document there were in this row so far."""
    return begins(doc_ids).cumsum(1)
