"""LayerNorm on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.row_norms import normalise

__all__ = ["layer_norm"]


def layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """Arguments and results as `reference`."""
    if not _leads(weight, x):
        weight, bias = weight.expand(x.shape), None if bias is None else bias.expand(x.shape)
    return normalise(x, branch, weight, bias, eps=eps, centred=True, out_dtype=out_dtype)


def _leads(weight: Tensor, x: Tensor) -> bool:
    """Whether rows that share a weight are neighbours: it has the leading axes of x, then ones."""
    lead = weight.shape[:-1]
    own = next((i for i in range(len(lead), 0, -1) if lead[i - 1] != 1), 0)
    return lead[:own] == x.shape[:own]
