"""The mixer of version 1: a selective scan (Gu and Dao 2023, arXiv:2312.00752, section 3 and algorithm 2).

Of every token a step size, and what leads into the states and out of them; 16 states for each channel.

    u, z = W_in x;   u = silu(conv(u));   dt, B, C = W_x u;   d = softplus(W_dt dt + b)
    h_t = exp(d_t A) h_{t-1} + d_t B_t u_t;   y_t = C_t h_t + D u_t;   out = W_out (y silu(z))

Shapes: B rows, T tokens, D width, E inner width, N states, R rank of step sizes, k taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import at_least_fp32
from kernels.selective_scan import selective_scan
from models.layers.flops import Flops, matmul_flops
from models.state_space.config import MambaConfig
from models.state_space.mixer import Documents, Mixer, State, begin_step_sizes, uniformly_

__all__ = ["SelectiveMixer"]

OPERATIONS_OF_A_STATE = 9  # of a token: decay, its exponential, input, recurrence, output


class SelectiveMixer(Mixer):
    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__()
        inner, states, rank = cfg.inner, cfg.states, cfg.rank
        self.cfg, self.channels = cfg, inner
        self.in_proj = nn.Linear(cfg.d_model, 2 * inner, bias=cfg.use_bias)
        self.conv1d = nn.Conv1d(inner, inner, cfg.d_conv, groups=inner, bias=cfg.use_conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, cfg.d_model, bias=cfg.use_bias)

    def forward(
        self, x: Tensor, documents: Documents | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, E)
        u, recent = self.convolved(u, documents, state)
        states = self.cfg.states
        dt, into, out = self.x_proj(u).split((self.cfg.rank, states, states), dim=-1)
        exact = at_least_fp32(self.A_log.dtype)
        y, last = selective_scan(
            u,
            F.linear(dt, self.dt_proj.weight),  # its bias is added in the scan, in fp32
            -self.A_log.to(exact).exp(),
            into,
            out,
            self.D.to(exact),
            z,
            self.dt_proj.bias.to(exact),
            None if state is None else state.states,
            None if documents is None else documents.begins,
            kernels=self.kernels,
        )
        return self.out_proj(y), State(recent, last)

    def empty(self, rows: int) -> State:
        cfg, like = self.cfg, self.A_log
        return State(
            like.new_zeros(rows, cfg.d_conv - 1, cfg.inner),
            like.new_zeros(rows, cfg.inner, cfg.states, dtype=at_least_fp32(like.dtype)),
        )

    def init_weights(self, generator: torch.Generator) -> None:
        cfg = self.cfg
        self.init_projections(cfg, generator)
        bound = cfg.rank**-0.5 * cfg.time_step_scale
        if cfg.time_step_init_scheme == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            uniformly_(self.dt_proj.weight, bound, generator)
        begin_step_sizes(self.dt_proj.bias, cfg, generator)
        with torch.no_grad():  # rates 1 to N of every channel (S4D-Real)
            self.A_log.copy_(torch.arange(1, cfg.states + 1).double().log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {**super().kernel_calls(seq_len), "selective_scan": {"columns": self.cfg.inner}}

    def flops(self, seq_len: int) -> Flops:
        cfg = self.cfg
        inner, rank, states = cfg.inner, cfg.rank, cfg.states
        weights = 3 * cfg.d_model * inner + inner * (rank + 2 * states) + rank * inner
        scan = float(OPERATIONS_OF_A_STATE * inner * states)
        return matmul_flops(weights + cfg.d_conv * inner) + Flops(scan, 3 * scan)
