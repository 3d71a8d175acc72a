"""The convolution on a CPU, compiled: one pass over inputs and outputs. See conv.cpp.

Shapes: B rows, T tokens, E channels, k taps.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import CPP, KERNELS
from kernels.causal_conv1d.operation import Gradients, operation
from kernels.cpp import library, named, pointer

__all__ = ["causal_conv1d"]

SOURCE = str(KERNELS["causal_conv1d"].implementations[CPP].source)


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "tokens", "width", "taps", "activation")]


class Inputs(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "initial", "reach")),
    ]


class Outputs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "weight", "bias", "initial")]


class Given:
    """The arguments as the kernel reads them, and kept alive while it does."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        run: Tensor | None,
        activation: bool,
    ) -> None:
        rows, tokens, width = x.shape
        taps = weight.shape[2]
        self.sizes = Sizes(rows, tokens, width, taps, activation)
        self.x = x if x.stride(2) == 1 else x.contiguous()
        # What is before the first token belongs to its document.
        before = initial.to(x.dtype).float() if initial is not None else None  # rounded as x is
        self.tensors = (
            weight[:, 0].t().float().contiguous(),
            None if bias is None else bias.float().contiguous(),
            None if before is None else before.contiguous(),
            _reach(run, rows, tokens, taps),
        )
        self.inputs = Inputs(
            self.x.data_ptr(), self.x.stride(0), self.x.stride(1), *map(pointer, self.tensors)
        )


def _reach(run: Tensor | None, rows: int, tokens: int, taps: int) -> Tensor:
    """(B, T) int32: how many tokens back there is one of the same document, at most k - 1."""
    reach = torch.full((rows, tokens), taps - 1, dtype=torch.int32)
    if run is None:
        return reach
    for back in range(taps - 1, 0, -1):
        reach[:, back:].masked_fill_(run[:, back:] != run[:, :-back], back - 1)
    return reach


def _forward(y: Tensor, x: Tensor, *given: Tensor | bool | None) -> None:
    arguments = Given(x, *given)  # type: ignore[arg-type]
    library(SOURCE).run(named("forward", x), len(x), x.numel(), arguments.sizes, arguments.inputs, pointer(y))


def _backward(made: Gradients, dy: Tensor, x: Tensor, *given: Tensor | bool | None) -> None:
    arguments, dy = Given(x, *given), dy.contiguous()  # type: ignore[arg-type]
    dx, dweight, dbias, dinitial = made
    rows, width, taps = len(x), x.shape[2], dweight.shape[2]
    of_taps, of_shift = torch.empty(rows, taps, width), torch.empty(rows, width)
    outputs = Outputs(*map(pointer, (dx, of_taps, of_shift, dinitial)))
    library(SOURCE).run(
        named("backward", x), rows, x.numel(), arguments.sizes, arguments.inputs, pointer(dy), outputs
    )
    dweight.copy_(of_taps.sum(0).t()[:, None])
    if dbias.numel():
        torch.sum(of_shift, 0, out=dbias)


causal_conv1d = operation("cpp", _forward, _backward)
