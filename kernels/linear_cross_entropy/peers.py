"""The head loss as others compute it, for the benchmark: the sum over rows alone, of plain cross-entropy."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

__all__ = ["of_cut_cross_entropy", "of_liger", "of_torch"]


def of_torch(hidden: Tensor, weight: Tensor, targets: Tensor, weights: None = None, **kind: Any) -> Tensor:
    """torch's own, in chunks (2.13)."""
    try:
        from torch.nn import LinearCrossEntropyOptions
    except ImportError as error:
        raise ImportError("torch has F.linear_cross_entropy from 2.13 on") from error
    _plain(weight, weights, **kind)
    options = LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def of_liger(hidden: Tensor, weight: Tensor, targets: Tensor, weights: None = None, **kind: Any) -> Tensor:
    """liger-kernel's, in Triton; its weight gradient is summed in fp32, as ours."""
    import torch
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    _plain(weight, weights, **kind)
    return liger_fused_linear_cross_entropy(
        hidden, weight, targets, reduction="sum", accum_dtype=torch.float32
    )


def of_cut_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: None = None, **kind: Any
) -> Tensor:
    """Apple's, which computes logits twice, keeps none, and skips gradients below 2^-12."""
    from cut_cross_entropy import linear_cross_entropy

    _plain(weight, weights, **kind)
    return linear_cross_entropy(hidden, weight, targets, reduction="sum")


def _plain(weight: Tensor, weights: Tensor | None, *, vocab_size: int, softcap: Any, z_loss: float) -> None:
    """They are timed at what all of them can do."""
    assert weights is None and vocab_size == weight.shape[0] and softcap is None and not z_loss
