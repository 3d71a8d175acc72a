"""What the layers of one forward pass compute attention with: chosen and built once, before the first of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention.visible import Visible

__all__ = ["Backend", "Options", "Plan"]


class Options(NamedTuple):
    """`dtype` of queries, keys and values; `softcap` c turns scores s into c tanh(s / c) (Gemma Team 2024, section 2);
    `dropout` of the probabilities; `scale` of the products, 1 / sqrt(h) if None."""

    dtype: torch.dtype
    softcap: float | None = None
    dropout: float = 0.0
    scale: float | None = None

    def scale_of(self, q: Tensor) -> float:
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class Backend:
    """One implementation of attention: `build(visible, options)` makes what it needs beside queries, keys and values;
    `attend(q, k, v, built, options)` computes with it, q (B, H, T, h), k and v (B, G, S, h)."""

    build: Callable[[Visible, Options], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any, Options], Tensor]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        visible: Visible,
        softcap: float | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """Both at once; what was built for this `visible` before is taken again."""
        return Plan.of(self, visible, Options(q.dtype, softcap, dropout, scale)).run(q, k, v)


@dataclass(frozen=True, eq=False)
class Plan:
    """Made by `plan_attention`; handed to every layer, and by it to `attention`."""

    visible: Visible
    backend: Backend
    built: Any
    options: Options

    @classmethod
    def of(cls, backend: Backend, visible: Visible, options: Options) -> Plan:
        key = backend, options
        if key not in visible.kept:
            visible.kept[key] = backend.build(visible, options)
        return cls(visible, backend, visible.kept[key], options)

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] > self.visible.queries:  # the first tokens are only looked at
            q = q[:, :, -self.visible.queries :]
        return self.backend.attend(q, k, v, self.built, self.options)
