"""The recurrence as others compute it, for the benchmark."""

from __future__ import annotations

from torch import Tensor

__all__ = ["of_mamba_ssm"]

HEAD = 64  # channels of one of its heads


def of_mamba_ssm(x: Tensor, decay: Tensor, initial: Tensor | None) -> Tensor:
    """As H-Net's own code does it (`hnet/modules/dc.py`): version 2 of Mamba with one state a channel, whose step sizes
    are logarithms of decays, and divide what comes in beforehand. Decays of 0 are beyond it."""
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    heads = x.shape[2] // HEAD
    steps = -decay.clamp(min=1e-4, max=1 - 1e-4).log()  # (B, T)
    ones = steps.new_ones(*steps.shape, 1, 1, dtype=x.dtype)
    y = mamba_chunk_scan_combined(
        (x / steps[..., None]).to(x.dtype).unflatten(-1, (heads, HEAD)),
        steps[..., None].expand(-1, -1, heads),
        -torch.ones(heads, device=x.device),
        ones,
        ones,
        256,
        initial_states=None if initial is None else initial.view(len(x), heads, HEAD, 1),
    )
    return y.flatten(2)
