"""Causal convolutions over the bytes of a row, in front of its patches (section 2.3.1).

Shapes: B rows, L places, D width of a byte, w places that a convolution sees.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WIDTHS", "PatchConvolutions"]

WIDTHS = (3, 5, 7)


class PatchConvolutions(nn.Module):
    """One behind the other, x + W relu(x_{t-w+1..t}): a byte's embedding tells of those before it, wherever in its
    patch it stands. The paper gives the widths; that they are residual, and what is between them, is chosen here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixes = nn.ModuleList(nn.Linear(w * width, width, bias=False) for w in WIDTHS)

    def forward(self, x: Tensor, documents: Tensor | None, cache: Any = None) -> Tensor:
        """x (B, L, D); documents (B, L): places of one number are of one document, None: all are. With a cache, x goes
        on with what that holds."""
        for number, (w, mix) in enumerate(zip(WIDTHS, self.mixes, strict=True)):
            y = F.relu(x)
            if cache is None:
                y = F.pad(y, (0, 0, w - 1, 0))
            else:
                y = torch.cat((cache[f"conv_{number}"].to(y.dtype), y), 1)
                cache[f"conv_{number}"] = y[:, y.shape[1] - (w - 1) :]
            taps = y.unfold(1, w, 1).transpose(2, 3)  # (B, L, w, D), the place itself last
            if documents is not None:
                ids = F.pad(documents, (w - 1, 0), mode="constant", value=-1).unfold(1, w, 1)  # (B, L, w)
                taps = taps * (ids == documents[..., None])[..., None]
            x = x + mix(taps.flatten(2))
        return x
