"""What the mixers of both versions have in common.

Shapes: B rows, T tokens, C channels of the convolution, k taps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d
from kernels.choose import UsesKernels
from models.layers.flops import Flops
from models.layers.init import uniform_
from models.state_space.config import MambaConfig

__all__ = ["Documents", "Mixer", "State", "begin_step_sizes", "kaiming_", "uniformly_"]


class State(NamedTuple):
    """What a mixer keeps of the tokens before: inputs of the convolution (B, k - 1, C), the oldest first, and states,
    at least fp32, with rows along dim 0."""

    recent: Tensor
    states: Tensor


class Documents(NamedTuple):
    """Of a row that holds several: ids (B, T), and where one begins behind another, (B, T) bool."""

    ids: Tensor
    begins: Tensor


class Mixer(UsesKernels):
    """`forward` gives what a mixer adds to the residual stream, and the state behind the last token."""

    channels: int  # C
    conv1d: nn.Conv1d
    out_proj: nn.Linear

    def forward(
        self, x: Tensor, documents: Documents | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def empty(self, rows: int) -> State:
        """Before the first token."""
        raise NotImplementedError(f"{type(self).__name__} must define empty")

    def init_weights(self, generator: torch.Generator) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define init_weights")

    def flops(self, seq_len: int) -> Flops:
        raise NotImplementedError(f"{type(self).__name__} must define flops")

    def convolved(
        self, inputs: Tensor, documents: Documents | None, state: State | None
    ) -> tuple[Tensor, Tensor]:
        """silu of the convolution of inputs (B, T, C), and the inputs that the next token's will see."""
        taps = self.conv1d.weight.shape[-1]
        recent = None if state is None else state.recent.to(inputs.dtype)
        y = causal_conv1d(
            inputs,
            self.conv1d.weight,
            self.conv1d.bias,
            recent,
            None if documents is None else documents.ids,
            activation=True,
            kernels=self.kernels,
        )
        if recent is None:
            recent = inputs.new_zeros(inputs.shape[0], taps - 1, inputs.shape[2])
        last = inputs[:, max(0, inputs.shape[1] - taps + 1) :]  # all that can still be seen
        return y, torch.cat((recent, last), dim=1)[:, last.shape[1] :]

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"causal_conv1d": {"columns": self.channels}}

    def init_projections(self, cfg: MambaConfig, generator: torch.Generator) -> None:
        """Of Linears and the convolution."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                kaiming_(module, generator)
        if cfg.rescale_prenorm_residual:
            with torch.no_grad():
                self.out_proj.weight /= math.sqrt(cfg.n_layers)
        bound = cfg.d_conv**-0.5
        uniformly_(self.conv1d.weight, bound, generator)
        if self.conv1d.bias is not None:
            uniformly_(self.conv1d.bias, bound, generator)


def kaiming_(linear: nn.Linear, generator: torch.Generator) -> None:
    """Weights evenly within 1 / sqrt(fan-in), as torch begins; biases 0."""
    uniformly_(linear.weight, linear.in_features**-0.5, generator)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def uniformly_(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill evenly between -bound and bound."""
    uniform_(tensor, bound / 3**0.5, generator)


@torch.no_grad()
def begin_step_sizes(bias: Tensor, cfg: MambaConfig, generator: torch.Generator) -> None:
    """Fill with the inverse softplus of step sizes that are log-uniform: softplus(bias) = dt."""
    uniformly_(bias, 1.0, generator)
    low, high = math.log(cfg.time_step_min), math.log(cfg.time_step_max)
    dt = ((bias + 1) / 2 * (high - low) + low).exp().clamp(min=cfg.time_step_floor)
    bias.copy_(dt + (-torch.expm1(-dt)).log())
