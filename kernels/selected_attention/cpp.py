"""Selected attention on a CPU, compiled: a query's scores are few, and stay in the first cache. See selected.cpp.

Shapes: B rows, T queries, S keys, H heads in G groups, h width of keys, w of values, N blocks.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import CPP, KERNELS
from kernels.cpp import library, named, pointer
from kernels.selected_attention.operation import operation

__all__ = ["selected_attention"]

SOURCE = str(KERNELS["selected_attention"].implementations[CPP].source)
SLICES, SLICE = 4, 512  # of queries: at most so many, at least so large; each has gradients of all keys


class Sizes(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "rows",
                "queries",
                "keys",
                "heads",
                "groups",
                "width",
                "wide",
                "block",
                "count",
                "slices",
                "slice",
            )
        ),
        ("scale", ctypes.c_float),
    ]


class Inputs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("q", "k", "v", "starts", "positions")]


class Outputs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("o", "do", "totals")]


class Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("q", "k", "v")]


class Given:
    """The arguments as the kernel reads them, and kept alive while it does."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, positions: Tensor, block: int, scale: float
    ) -> None:
        rows, queries, heads, width = q.shape
        keys, groups, wide, count = k.shape[1], k.shape[2], v.shape[3], starts.shape[3]
        self.slices = min(SLICES, -(-queries // SLICE))
        self.sizes = Sizes(
            rows,
            queries,
            keys,
            heads // groups,
            groups,
            width,
            wide,
            block,
            count,
            self.slices,
            -(-queries // self.slices),
            scale,
        )
        self.tensors = [t.contiguous() for t in (q, k, v, starts, positions)]
        self.inputs = Inputs(*map(pointer, self.tensors))
        self.items = rows * groups * self.slices
        self.work = rows * queries * heads * count * block


def _forward(made: tuple[Tensor, Tensor], q: Tensor, *arguments: Tensor | float) -> None:
    given = Given(q, *arguments)  # type: ignore[arg-type]
    outputs = map(pointer, made)
    library(SOURCE).run(named("forward", q), given.items, given.work, given.sizes, given.inputs, *outputs)


def _backward(
    made: tuple[Tensor, ...],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    positions: Tensor,
    o: Tensor,
    totals: Tensor,
    block: int,
    scale: float,
) -> None:
    given, do = Given(q, k, v, starts, positions, block, scale), do.contiguous()
    dq, dk, dv = made
    # A slice of queries sees no key behind its last one: there it leaves what is here.
    of_keys, of_values = (torch.zeros(given.slices, *t.shape) for t in (k, v))
    library(SOURCE).run(
        named("backward", q),
        given.items,
        given.work,
        given.sizes,
        given.inputs,
        Outputs(*map(pointer, (o, do, totals))),
        Gradients(*map(pointer, (dq, of_keys, of_values))),
    )
    dk.copy_(of_keys.sum(0))
    dv.copy_(of_values.sum(0))


selected_attention = operation("selected_attention_cpp", _forward, _backward)
