"""What opens a chunk: neighbours whose encodings differ (Hwang et al. 2025, arXiv:2507.07955, equation 4).

    p_t = (1 - cos(W_q x_{t-1}, W_k x_t)) / 2, and 1 where a document begins;  b_t = [p_t > 1/2]

The authors' code (`hnet/modules/dc.py`) projects the earlier one by W_q, and opens no chunk at a tie; so does this.

Shapes: R rows, M places, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.boundaries import boundaries, sureness
from kernels.choose import UsesKernels
from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["FixedRouter", "Routed", "Router", "ratio_loss"]


class Routed(NamedTuple):
    """Of each place, (R, M): `p`, at least fp32; whether it `opens` a chunk; its `confidence` in that, p if it does and
    1 - p elsewhere (equation 8). `last` (R, D): what is to be given with what comes next."""

    p: Tensor
    opens: Tensor
    confidence: Tensor
    last: Tensor

    @classmethod
    def by(cls, p: Tensor, valid: Tensor | None, last: Tensor) -> Routed:
        """What a probability decides."""
        return cls(p, *sureness(p, valid), last)


class Router(UsesKernels):
    """Computed in at least fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj_layer = nn.Linear(width, width, bias=False)
        self.k_proj_layer = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        begins: Tensor,
        places: Tensor | None,
        valid: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Routed:
        """x (R, M, D), begins (R, M) bool; valid (R, M) bool, places that are not empty (None: all); `last` of what
        came before (None: nothing). `places` is not looked at."""
        exact = at_least_fp32(x.dtype)
        with own_dtypes(x.device):
            x = x.to(exact)
            q = F.linear(x, self.q_proj_layer.weight.to(exact))
            k = F.linear(x, self.k_proj_layer.weight.to(exact))
        return Routed(*boundaries(q, k, begins, valid, last, kernels=self.kernels), q[:, -1])

    @torch.no_grad()
    def init_weights(self) -> None:
        """The identity: at first neighbours are compared as they are."""
        nn.init.eye_(self.q_proj_layer.weight)
        nn.init.eye_(self.k_proj_layer.weight)

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"boundaries": {"columns": self.q_proj_layer.in_features}}


class FixedRouter(nn.Module):
    """Every N-th place of a document opens a chunk, whatever it holds: the baseline H-Net (pool), which learns no
    boundaries."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def forward(
        self,
        x: Tensor,
        begins: Tensor,
        places: Tensor | None,
        valid: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Routed:
        """As `Router`; `places` (R, M) int64: of each in its document."""
        assert places is not None, "the stage gives them to this router"
        p = (places % self.every == 0).to(at_least_fp32(x.dtype))
        return Routed.by(p, valid, p.new_zeros(len(x), x.shape[-1]))


def ratio_loss(opened: Tensor, probability: Tensor, ratio: float) -> Tensor:
    """N / (N - 1) ((N - 1) F G + (1 - F) (1 - G)), of F, the part of places that opened a chunk, and G, their mean
    probability, of one shape (Hwang et al. 2025, equation 10). Only G has a gradient. 1 where both are 1 / N."""
    opened, n = opened.detach(), ratio
    return n / (n - 1) * ((n - 1) * opened * probability + (1 - opened) * (1 - probability))
