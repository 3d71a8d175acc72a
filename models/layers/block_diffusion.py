"""Who may attend to whom in block diffusion (Arriola et al. 2025, section 3.2 and figure 3)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cached_mask", "one_pass_mask"]


def one_pass_mask(blocks: Tensor) -> Tensor:
    """(2L, 2L) bool for noisy tokens followed by the clean ones; rows are queries, True is allowed.

    blocks (L,): block of each position, not decreasing. Allowed: the own block in the own half; from noisy to
    clean tokens of earlier blocks; from clean to clean tokens of earlier blocks. So noisy blocks never see
    each other, and clean tokens never see noise: L^2 + L L' pairs for equal blocks of L'.
    """
    same = blocks[:, None] == blocks[None, :]  # (L, L)
    later = blocks[:, None] > blocks[None, :]
    noisy = torch.cat((same, later), dim=1)
    clean = torch.cat((torch.zeros_like(same), same | later), dim=1)
    return torch.cat((noisy, clean), dim=0)


def cached_mask(blocks: Tensor, cached: int) -> Tensor:
    """(T, cached + T) bool: new tokens see all that is cached, their own block, and new blocks before it."""
    fresh = blocks[:, None] >= blocks[None, :]  # (T, T)
    return torch.cat((fresh.new_ones(fresh.shape[0], cached), fresh), dim=1)
