"""The definition: by a sum and a scatter, nothing is sorted."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(opens: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """opens (R, M) bool -> source (R, `chunks`) and chunk (R, M), int64."""
    chunk = opens.cumsum(1) - 1
    slot = chunk.where(opens, chunks)
    place = torch.arange(opens.shape[1], device=opens.device).expand(opens.shape)
    # Places that open nothing all write behind the last.
    source = place.new_zeros(len(opens), chunks + 1).scatter_(1, slot, place)
    return source[:, :chunks], chunk
