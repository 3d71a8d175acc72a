"""What the layers of one forward pass attend within patches with: chosen and built once, before the first of them.

Shapes: B rows, K patches of P places, L = K P, H heads, h head width, r places of the patch before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import Visible
from kernels.choose import Kernels

__all__ = ["Backend", "Options", "PatchPlan", "Patches", "behind"]


@dataclass(frozen=True, eq=False)
class Patches:
    """A place sees itself, what is before it in its patch, and the last `reach` places of the patch before, where that
    is of the same document. `size`: P; `documents` (B, K): neighbours of one number are of one document; `known` (B, L)
    bool: places that hold something (None: all); others are seen by themselves alone."""

    size: int
    reach: int
    documents: Tensor
    known: Tensor | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.reach <= self.size:
            raise ValueError(
                f"reach: must be from 0 to the {self.size} places of the patch before, got {self.reach}"
                if self.size > 0
                else f"size: must be at least 1, got {self.size}"
            )
        places = (self.documents.shape[0], self.documents.shape[-1] * self.size)
        if self.documents.ndim != 2 or (self.known is not None and self.known.shape != places):
            given = "" if self.known is None else f" and {tuple(self.known.shape)}"
            raise ValueError(
                f"documents (B, K) and known (B, {self.size} K) are needed, got {tuple(self.documents.shape)}{given}"
            )

    @cached_property
    def follows(self) -> Tensor:
        """(B, K) bool: patches whose document the one before is of, too."""
        return F.pad(self.documents[:, 1:] == self.documents[:, :-1], (1, 0))

    @property
    def visible(self) -> Visible:
        """The same of B K rows, each of P queries and of r + P keys."""
        (rows, patches), size, reach = self.documents.shape, self.size, self.reach
        device, mask = self.documents.device, None
        if reach or self.known is not None:
            known = self.known
            if known is None:
                known = torch.ones(rows, patches * size, dtype=torch.bool, device=device)
            known = known.unflatten(1, (patches, size))  # (B, K, P)
            before = known.roll(1, 1)[..., size - reach :] & self.follows[..., None]
            mask = torch.cat((before, known), -1).flatten(0, 1)[:, None, None].expand(-1, -1, size, -1)
            if self.known is not None:
                place = torch.arange(-reach, size, device=device)
                mask = mask | (place == place[reach:, None])
        return Visible(rows * patches, size, reach + size, device, mask=mask)


class Options(NamedTuple):
    """`dtype` of queries, keys and values; `dropout` of the probabilities."""

    dtype: torch.dtype
    dropout: float = 0.0


@dataclass(frozen=True)
class Backend:
    """One implementation: `build(patches, options, heads, width, kernels)` makes what it needs beside queries, keys and
    values; `attend(q, k, v, patches, built, options)` computes with it, all of them (B, L, H, h)."""

    build: Callable[[Patches, Options, int, int, Kernels], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Patches, Any, Options], Tensor]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, patches: Patches, dropout: float = 0.0) -> Tensor:
        """Both at once."""
        options = Options(q.dtype, dropout)
        built = self.build(patches, options, q.shape[2], q.shape[3], Kernels())
        return self.attend(q, k, v, patches, built, options)


@dataclass(frozen=True, eq=False)
class PatchPlan:
    """Made by `plan_patches`; handed to every layer, and by it to `patch_attention`."""

    patches: Patches
    backend: Backend
    built: Any
    options: Options


def behind(x: Tensor, patches: Patches) -> Tensor:
    """x (B, L, H, h) -> (B K, H, r + P, h): every patch behind the last r places of the one before, the first ones of
    rows behind zeros."""
    own = x.unflatten(1, (-1, patches.size))  # (B, K, P, H, h)
    if patches.reach:
        before = F.pad(own[:, :, patches.size - patches.reach :], (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        own = torch.cat((before, own), 2)
    return own.flatten(0, 1).transpose(1, 2)
