"""Masks of attention: bool, True where a query may look, and what to add to scores."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

__all__ = ["additive", "same"]


def same(of_queries: Tensor, of_keys: Tensor) -> Tensor:
    """(B, T) and (B, S) -> (B, 1, T, S): whether the two numbers are equal, as those of documents."""
    return of_queries[:, None, :, None] == of_keys[:, None, None, :]


@overload
def additive(mask: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def additive(mask: None, dtype: torch.dtype) -> None: ...
@overload
def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask as what to add to scores: 0 where it is True, -inf elsewhere. None stays None."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
