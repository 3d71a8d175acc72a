"""Which dtype a computation runs in, with or without autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["at_least_fp32", "compute_dtype", "own_dtypes"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of `x` runs here: autocast's, if it is on and would touch `x`.

    Autocast leaves fp64 alone, so a model cast to fp64 computes everything in fp64. Tensors on the meta device, which
    has no autocast, keep their own.
    """
    device = x.device.type
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def own_dtypes(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast, for computations that choose their dtypes. The meta device has none to be turned off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for statistics over data of `dtype`: fp64 stays, everything narrower becomes fp32."""
    return dtype if dtype == torch.float64 else torch.float32
