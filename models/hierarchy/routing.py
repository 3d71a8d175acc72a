"""What opens a chunk: neighbours whose encodings differ (Hwang et al. 2025, arXiv:2507.07955, equation 4).

    p_t = (1 - cos(W_q x_{t-1}, W_k x_t)) / 2, and 1 where a document begins;  b_t = [p_t > 1/2]

The authors' code (`hnet/modules/dc.py`) projects the earlier one by W_q, and opens no chunk at a tie; so does this.

Shapes: R rows, M places, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import at_least_fp32, own_dtypes

__all__ = ["FixedRouter", "Router", "ratio_loss"]


class Router(nn.Module):
    """Computed in at least fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj_layer = nn.Linear(width, width, bias=False)
        self.k_proj_layer = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, begins: Tensor, places: Tensor, last: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (R, M, D), begins (R, M) bool -> p (R, M), at least fp32, and `last` (R, D) behind the last place, to be
        given with what comes next. `places` is not looked at."""
        exact = at_least_fp32(x.dtype)
        with own_dtypes(x.device):
            x = x.to(exact)
            q = F.normalize(F.linear(x, self.q_proj_layer.weight.to(exact)), dim=-1)
            k = F.normalize(F.linear(x, self.k_proj_layer.weight.to(exact)), dim=-1)
            first = q[:, :1] if last is None else last[:, None].to(exact)
            before = torch.cat((first, q[:, :-1]), dim=1)
            p = ((1 - (before * k).sum(-1)) / 2).clamp(0, 1)
            return p.masked_fill(begins, 1.0), q[:, -1]

    @torch.no_grad()
    def init_weights(self) -> None:
        """The identity: at first neighbours are compared as they are."""
        nn.init.eye_(self.q_proj_layer.weight)
        nn.init.eye_(self.k_proj_layer.weight)


class FixedRouter(nn.Module):
    """Every N-th place of a document opens a chunk, whatever it holds: the baseline H-Net (pool), which learns no
    boundaries."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def forward(
        self, x: Tensor, begins: Tensor, places: Tensor, last: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Router`; `places` (R, M) int64: of each in its document."""
        opens = (places % self.every == 0).to(at_least_fp32(x.dtype))
        return opens, opens.new_zeros(len(x), x.shape[-1])


def ratio_loss(opened: Tensor, probability: Tensor, ratio: float) -> Tensor:
    """N / (N - 1) ((N - 1) F G + (1 - F) (1 - G)), of F, the part of places that opened a chunk, and G, their mean
    probability, of one shape (Hwang et al. 2025, equation 10). Only G has a gradient. 1 where both are 1 / N."""
    opened, n = opened.detach(), ratio
    return n / (n - 1) * ((n - 1) * opened * probability + (1 - opened) * (1 - probability))
