"""How much of each branch a head takes (Yuan et al. 2025, equation 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.init import INIT_STD, normal_

__all__ = ["Gates"]


class Gates(nn.Module):
    """A sigmoid, not a softmax, of an MLP for each branch and head: branches do not compete. At the start every token
    has the gates that `bias`, one number for each branch, says."""

    def __init__(self, d_model: int, hidden: int, heads: int, bias: Sequence[float]) -> None:
        super().__init__()
        self.heads, self.begin = heads, list(bias)
        self.hidden = nn.Linear(d_model, hidden)
        self.out = nn.Linear(hidden, heads * len(bias))

    def init_weights(self, generator: torch.Generator) -> None:
        normal_(self.hidden.weight, INIT_STD, generator)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.out.weight)
        with torch.no_grad():
            self.out.bias.copy_(torch.tensor(self.begin).repeat(self.heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, branches) between 0 and 1, of x (B, T, D)."""
        return self.out(F.silu(self.hidden(x))).unflatten(-1, (self.heads, -1)).sigmoid()
