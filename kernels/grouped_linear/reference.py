"""The definition of the product of groups."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["reference"]


# Compiled, every other size of a group would be another graph.
@torch.compiler.disable
def reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (M, K), weight (E, N, K), ends (E,) -> (M, N), group by group. Waits for the device: slices need their bounds
    on the host."""
    bounds = ends.tolist()
    assert bounds[-1] == len(x), f"the last group ends at row {bounds[-1]} of {len(x)}"
    sizes = [end - start for start, end in pairwise([0, *bounds])]
    # Of split and unbind the gradient is one tensor for all groups, not a sum of as many as there are.
    return torch.cat([rows @ w.mT for rows, w in zip(x.split(sizes), weight.unbind(), strict=True)])
