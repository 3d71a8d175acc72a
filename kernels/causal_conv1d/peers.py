"""The convolution as others compute it, for the benchmark."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.documents import runs

__all__ = ["of_causal_conv1d", "of_fla"]


def of_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    doc_ids: Tensor | None,
    *,
    activation: bool,
) -> Tensor:
    """causal-conv1d's CUDA kernel, channels last."""
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(
        x.transpose(1, 2),
        weight[:, 0],
        bias,
        seq_idx=None if doc_ids is None else runs(doc_ids).to(torch.int32),
        initial_states=None if initial is None else initial.transpose(1, 2),
        activation="silu" if activation else None,
    ).transpose(1, 2)


def of_fla(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    doc_ids: Tensor | None,
    *,
    activation: bool,
) -> Tensor:
    """fla-core's Triton kernel; its documents are offsets of one row, and its states another layout."""
    from fla.modules.convolution import causal_conv1d

    assert initial is None and doc_ids is None
    y, _ = causal_conv1d(x, weight[:, 0].contiguous(), bias, activation="silu" if activation else None)
    return y
