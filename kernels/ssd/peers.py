"""State-space duality as others compute it, for the benchmark."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import runs

__all__ = ["of_fla", "of_mamba_ssm"]


def of_mamba_ssm(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    doc_ids: Tensor | None,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The authors' Triton kernels."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        x,
        delta,
        A,
        B,
        C,
        chunk,
        D=D,
        dt_bias=delta_bias,
        initial_states=initial,
        seq_idx=None if doc_ids is None else runs(doc_ids).to(torch.int32),
        dt_softplus=True,
        return_final_states=True,
    )


def of_fla(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    doc_ids: Tensor | None,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """fla-core's linear attention with one decay a head, B and C repeated for every head."""
    from fla.ops.simple_gla import chunk_simple_gla

    assert doc_ids is None
    steps = F.softplus(delta.float() + (0.0 if delta_bias is None else delta_bias))  # (B, T, H)
    into, out = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    values = (x * steps[..., None]).to(x.dtype)
    states = None if initial is None else initial.transpose(2, 3)
    y, last = chunk_simple_gla(
        out, into, values, g=steps * A, scale=1.0, initial_state=states, output_final_state=True
    )
    y = y if D is None else y + D[:, None] * x
    return y.to(x.dtype), last.transpose(2, 3)
