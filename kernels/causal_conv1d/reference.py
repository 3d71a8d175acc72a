"""The definition of a causal convolution, channel by channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import runs
from kernels.precision import at_least_fp32

__all__ = ["reference"]


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    doc_ids: Tensor | None,
    *,
    activation: bool,
) -> Tensor:
    """x (B, T, E), weight (E, 1, k), bias (E,), initial (B, k - 1, E), doc_ids (B, T) -> (B, T, E) in x's dtype; a sum
    of k products with x shifted, in at least fp32."""
    taps, tokens, exact = weight.shape[-1], x.shape[1], at_least_fp32(x.dtype)
    before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial is None else initial.to(x.dtype)
    seen = torch.cat((before, x), dim=1).to(exact)  # (B, k - 1 + T, E)
    # What came before the first token belongs to its document.
    run = None if doc_ids is None else F.pad(runs(doc_ids), (taps - 1, 0))
    total: Tensor | float = 0.0 if bias is None else bias.to(exact)
    for tap in range(taps):
        shifted = seen[:, tap : tap + tokens]
        if run is not None and tap < taps - 1:
            other = run[:, tap : tap + tokens] != run[:, taps - 1 :]
            shifted = shifted.masked_fill(other[..., None], 0)
        total = total + shifted * weight[:, 0, tap].to(exact)
    assert isinstance(total, Tensor)
    return (F.silu(total) if activation else total).to(x.dtype)
