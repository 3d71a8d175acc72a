"""The definition of the selective scan, step by step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import at_least_fp32

__all__ = ["reference"]


def reference(
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
) -> tuple[Tensor, Tensor]:
    """u, delta, z (B, T, E); A (E, N); B, C (B, T, N); D, delta_bias (E,); initial (B, E, N); reset (B, T) -> y like u,
    the last states (B, E, N); computed in at least fp32."""
    stats = at_least_fp32(u.dtype)
    inputs, rates, to_state, of_state = (t.to(stats) for t in (u, A, B, C))
    steps = delta.to(stats) if delta_bias is None else delta.to(stats) + delta_bias.to(stats)
    steps = F.softplus(steps)
    state = inputs.new_zeros(len(u), *A.shape) if initial is None else initial.to(stats)
    outputs = []
    # The gradient of unbind is one tensor for all steps, not a sum of as many as there are.
    along = (t.unbind(1) for t in (steps[..., None], (steps * inputs)[..., None], to_state, of_state))
    for t, (step, entering, to, of) in enumerate(zip(*along, strict=True)):
        decay = torch.exp(step * rates)  # (B, E, N)
        if reset is not None:  # what is no number before it, too, is gone
            state = state.masked_fill(reset[:, t, None, None], 0.0)
        state = decay * state + entering * to[:, None]
        outputs.append((state * of[:, None]).sum(-1))
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(inputs)
    if D is not None:
        y = y + D.to(stats) * inputs
    if z is not None:
        y = y * F.silu(z.to(stats))
    return y.to(u.dtype), state
