"""The selective scan as others compute it, for the benchmark."""

from __future__ import annotations

from torch import Tensor

__all__ = ["of_mamba_ssm"]


def of_mamba_ssm(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    reset: Tensor | None,
) -> Tensor:
    """mamba_ssm's CUDA, which takes channels before steps, and knows no documents and no state to begin with. Its y
    alone."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    if initial is not None or reset is not None:
        raise ImportError("mamba_ssm scans neither documents nor from a state on")
    channels_first = (None if t is None else t.mT for t in (u, delta, B, C, z))
    x, steps, to_state, of_state, gate = channels_first
    bias = None if delta_bias is None else delta_bias.float()
    return selective_scan_fn(x, steps, A, to_state, of_state, D, gate, bias, delta_softplus=True).mT
