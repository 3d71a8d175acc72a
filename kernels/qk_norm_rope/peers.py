"""Normalised, rotated queries and keys as others compute them, for the benchmark."""

from __future__ import annotations

from torch import Tensor

__all__ = ["of_liger"]


def of_liger(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """liger-kernel's norm, twice, then its rotation, of layout "half" alone."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    assert not interleaved
    if q_weight is not None:
        q, k = (
            LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False)
            for x, w in ((q, q_weight), (k, k_weight))
        )
    elif q.is_contiguous() or k.is_contiguous():
        q, k = q.clone(), k.clone()  # what lies as it likes it is rotated in place
    tables = (t[..., 0, :] for t in (cos, sin))  # (T, r/2) or (B, T, r/2)
    q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *tables, None, 1, 2 * cos.shape[-1])
    return q.transpose(1, 2), k.transpose(1, 2)
