"""Weight initialisation from an explicit generator."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["INIT_STD", "normal_", "residual_std", "truncated_normal_", "uniform_"]

INIT_STD = 0.02  # GPT-2, and since then almost everyone


def residual_std(n_layers: int, std: float = INIT_STD) -> float:
    """Std of the two projections of a block that write to the residual stream, where other matrices have `std`: their
    2L contributions add up to a variance that does not grow with depth (Radford et al. 2019, section 2.3)."""
    return std / (2 * n_layers) ** 0.5


@torch.no_grad()
def normal_(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with N(0, std^2). Drawn on the generator's device, so that a CPU generator gives the same weights
    on every device; drawn in fp32 or better, so that the dtype does not change the draw."""
    if not tensor.is_meta:
        tensor.copy_(_normal(tensor, std, generator))


@torch.no_grad()
def truncated_normal_(tensor: Tensor, std: float, bound: float, generator: torch.Generator) -> None:
    """As `normal_`, of N(0, std^2) cut off at `bound` standard deviations. What is beyond is drawn anew: unlike torch's
    own function, in the same way in all its versions."""
    if tensor.is_meta:
        return
    draw = _normal(tensor, std, generator)
    while (beyond := draw.abs() > bound * std).any():
        draw = torch.where(beyond, _normal(tensor, std, generator), draw)
    tensor.copy_(draw)


@torch.no_grad()
def uniform_(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """As `normal_`, evenly between -sqrt(3) std and sqrt(3) std."""
    if not tensor.is_meta:
        bound = 3**0.5 * std
        tensor.copy_(_room(tensor, generator).uniform_(-bound, bound, generator=generator))


def _normal(like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return _room(like, generator).normal_(0.0, std, generator=generator)


def _room(like: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty(like.shape, dtype=dtype, device=generator.device)
