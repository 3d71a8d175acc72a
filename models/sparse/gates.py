"""How much of each branch a head takes (Yuan et al. 2025, equation 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.init import normal_

__all__ = ["Gates"]


class Gates(nn.Module):
    """A sigmoid, not a softmax, of an MLP for each branch and head: branches do not compete. At the start every token
    has the gates that `bias`, one number for each branch, says. `hidden` 0: of one matrix alone, without a bias, as
    `fla` has it; gates then begin at 1/2."""

    def __init__(self, d_model: int, hidden: int, heads: int, bias: Sequence[float]) -> None:
        super().__init__()
        self.heads, self.begin = heads, list(bias)
        self.hidden = nn.Linear(d_model, hidden) if hidden else None
        self.out = nn.Linear(hidden or d_model, heads * len(bias), bias=bool(hidden))

    def init_weights(self, generator: torch.Generator, std: float) -> None:
        nn.init.zeros_(self.out.weight)
        if self.hidden is None:
            return
        normal_(self.hidden.weight, std, generator)
        nn.init.zeros_(self.hidden.bias)
        with torch.no_grad():
            self.out.bias.copy_(torch.tensor(self.begin).repeat(self.heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, branches) between 0 and 1, of x (B, T, D)."""
        x = x if self.hidden is None else F.silu(self.hidden(x))
        return self.out(x).unflatten(-1, (self.heads, -1)).sigmoid()
