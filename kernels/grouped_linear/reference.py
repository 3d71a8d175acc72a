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
    bounds = [0, *ends.tolist()]
    assert bounds[-1] == len(x), f"the last group ends at row {bounds[-1]} of {len(x)}"
    # Of unbind the gradient is one tensor for all groups, not a sum of as many as there are.
    return torch.cat([x[a:b] @ w.mT for (a, b), w in zip(pairwise(bounds), weight.unbind(), strict=True)])
