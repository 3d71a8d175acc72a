"""The mixer of version 2: state-space duality (Dao and Gu 2024, arXiv:2405.21060, sections 6 and 7).

One rate of decay and one step size for each head, which makes of a chunk of tokens what masked attention makes of it.

    z, x, B, C, dt = W_in x;   x, B, C = silu(conv([x, B, C]));   d = softplus(dt + b)
    h_t = exp(d_t A) h_{t-1} + d_t x_t B_t;   y_t = C_t h_t + D x_t;   out = W_out RMSNorm(y silu(z))

Shapes: B rows, T tokens, D width, E inner width, H heads of P channels, G groups of them, N states, k taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.choose import UsesKernels
from kernels.gated_rms_norm import gated_rms_norm
from kernels.precision import at_least_fp32
from kernels.ssd import ssd
from models.layers.flops import Flops, matmul_flops
from models.state_space.config import MambaConfig
from models.state_space.mixer import Documents, Mixer, State, begin_step_sizes, uniformly_

__all__ = ["DualMixer", "GatedRMSNorm"]


class GatedRMSNorm(UsesKernels):
    """RMSNorm(y silu(z)) over each of `groups` parts of the last axis, times a gain; at least in fp32."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(y, z, self.weight, groups=self.groups, eps=self.eps, kernels=self.kernels)

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"gated_rms_norm": {"columns": len(self.weight)}}


class DualMixer(Mixer):
    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__()
        self.cfg, self.channels = cfg, cfg.inner + 2 * cfg.ngroups * cfg.states
        self.in_proj = nn.Linear(cfg.d_model, sum(self.parts(cfg)), bias=cfg.use_bias)
        self.conv1d = nn.Conv1d(
            self.channels, self.channels, cfg.d_conv, groups=self.channels, bias=cfg.use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(cfg.heads))
        self.A_log = nn.Parameter(torch.empty(cfg.heads))
        self.D = nn.Parameter(torch.empty(cfg.heads))
        self.norm = GatedRMSNorm(cfg.inner, cfg.ngroups, cfg.norm_eps)
        self.out_proj = nn.Linear(cfg.inner, cfg.d_model, bias=cfg.use_bias)

    @staticmethod
    def parts(cfg: MambaConfig) -> tuple[int, int, int, int, int]:
        """Rows of in_proj: z, x, B, C, dt."""
        of_states = cfg.ngroups * cfg.states
        return cfg.inner, cfg.inner, of_states, of_states, cfg.heads

    def forward(
        self, x: Tensor, documents: Documents | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        cfg, exact = self.cfg, at_least_fp32(self.A_log.dtype)
        z, inputs, dt = self.in_proj(x).split((cfg.inner, self.channels, cfg.heads), dim=-1)
        mixed, recent = self.convolved(inputs, documents, state)
        x, into, out = mixed.split((cfg.inner, *2 * (cfg.ngroups * cfg.states,)), dim=-1)
        y, last = ssd(
            x.unflatten(-1, (cfg.heads, cfg.headdim)),
            dt,
            -self.A_log.to(exact).exp(),
            into.unflatten(-1, (cfg.ngroups, cfg.states)),
            out.unflatten(-1, (cfg.ngroups, cfg.states)),
            self.D.to(exact),
            self.dt_bias.to(exact),
            None if state is None else state.states,
            None if documents is None else documents.ids,
            chunk=cfg.chunk_size,
            kernels=self.kernels,
        )
        return self.out_proj(self.norm(y.flatten(-2), z)), State(recent, last)

    def empty(self, rows: int) -> State:
        cfg, like = self.cfg, self.A_log
        return State(
            like.new_zeros(rows, cfg.d_conv - 1, self.channels),
            like.new_zeros(rows, cfg.heads, cfg.headdim, cfg.states, dtype=at_least_fp32(like.dtype)),
        )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        cfg, (low, high) = self.cfg, self.cfg.A_init_range
        self.init_projections(cfg, generator)
        begin_step_sizes(self.dt_bias, cfg, generator)
        uniformly_(self.A_log, 1.0, generator)
        self.A_log.copy_(((self.A_log + 1) / 2 * (high - low) + low).log())
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm.weight)

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {**super().kernel_calls(seq_len), "ssd": {"columns": self.cfg.inner}}

    def flops(self, seq_len: int) -> Flops:
        """Within a chunk every token meets all others of it, masked ones too, as the products do."""
        cfg = self.cfg
        chunk = min(cfg.chunk_size, seq_len)
        weights = cfg.d_model * (sum(self.parts(cfg)) + cfg.inner) + cfg.d_conv * self.channels
        within = 2.0 * chunk * (cfg.ngroups * cfg.states + cfg.inner)
        between = 4.0 * cfg.inner * cfg.states
        return matmul_flops(weights) + Flops(within + between, 3 * (within + between))
