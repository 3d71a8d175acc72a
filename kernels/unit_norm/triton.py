"""A vector's direction, on a GPU."""

from __future__ import annotations

from torch import Tensor

from kernels.row_norms import normalise

__all__ = ["unit_norm"]


def unit_norm(x: Tensor) -> Tensor:
    """Argument and result as `reference`."""
    return normalise(x, eps=1e-24, unit=True, out_dtype=x.dtype)[1]
