"""A bank in 8 or 4 bits: what its numbers are once they are stored so, with the gradient of those that are trained."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["levels", "quantized", "rounded"]


def levels(bits: int) -> int:
    """The largest integer: 127 of 8 bits, 7 of 4; the least is its negative, so that scales are symmetric."""
    return 2 ** (bits - 1) - 1


def quantized(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """rows (N, m) -> integers (N, m) int8 and the scale c of each row (N, 1): row = c * integers, to c / 2 at most.

    c = max|row| / 127, or / 7 of 4 bits; 1 of a row of zeros.
    """
    most = levels(bits)
    scale = rows.abs().amax(1, keepdim=True) / most
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (rows / scale).round().clamp(-most, most).to(torch.int8), scale


def rounded(rows: Tensor, bits: int) -> Tensor:
    """What (N, m) is after that, with the gradient of the identity (Bengio et al. 2013, arXiv:1308.3432)."""
    with torch.no_grad():
        integers, scale = quantized(rows, bits)
        stored = integers.to(rows.dtype) * scale
    return stored + (rows - rows.detach())
