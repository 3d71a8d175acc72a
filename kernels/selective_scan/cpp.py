"""The selective scan on a CPU, compiled: states stay in the first cache, nothing of a step but its results is written.

See scan.cpp.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import CPP, KERNELS
from kernels.cpp import library, named, pointer
from kernels.selective_scan.operation import Gradients, operation

__all__ = ["cpp"]

SOURCE = str(KERNELS["selective_scan"].implementations[CPP].source)
STEPS = 16  # of a block, as in the source
ITEMS = 16  # into as many pieces a call is cut, at least


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "length", "width", "states", "parts")]


class Inputs(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("u", "delta", "z", "A", "B", "C", "D", "bias", "initial", "reset")
    ]


class Outputs(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("u", "delta", "z", "A", "B", "C", "D", "bias", "initial")
    ]


def kept_shape(batch: int, length: int, width: int, states: int) -> tuple[int, ...]:
    """Of the states before each block: (blocks, B, N, E)."""
    return -(-length // STEPS), batch, states, width


def sizes_of(u: Tensor, A: Tensor) -> Sizes:
    rows, length, width = u.shape
    return Sizes(rows, length, width, A.shape[1], max(1, ITEMS // max(1, rows)))


def exact(t: Tensor | None) -> Tensor | None:
    """As the kernel reads it."""
    return None if t is None else t.float().contiguous()


class Given:
    """The arguments as the kernel reads them, and kept alive while it does."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        initial: Tensor | None,
        reset: Tensor | None,
    ) -> None:
        self.tensors = (
            u.contiguous(),
            delta.contiguous(),
            None if z is None else z.contiguous(),
            exact(A.mT),
            exact(B),
            exact(C),
            exact(D),
            exact(delta_bias),
            None if initial is None else exact(initial.mT),
            None if reset is None else reset.contiguous(),
        )
        self.inputs = Inputs(*map(pointer, self.tensors))


def forward(y: Tensor, final: Tensor, kept: Tensor, *given: Tensor | None) -> None:
    """Fills y, final and kept, which is empty where nothing is to be differentiated."""
    arguments, sizes = Given(*given), sizes_of(y, given[2])  # type: ignore[arg-type]
    last = torch.empty(final.mT.shape)
    library(SOURCE).run(
        named("forward", y),
        sizes.rows * sizes.parts,
        y.numel() * sizes.states,
        sizes,
        arguments.inputs,
        pointer(y),
        pointer(last),
        pointer(kept),
    )
    final.copy_(last.mT)


def backward(made: Gradients, dy: Tensor, dfinal: Tensor | None, *given: Tensor | None) -> None:
    """Fills the gradients."""
    *inputs, kept = given
    arguments, sizes = Given(*inputs), sizes_of(dy, inputs[2])  # type: ignore[arg-type]
    u, delta, A, B, C, D, z, bias, initial = made
    of_A, of_D, of_bias = (torch.empty(sizes.rows, *t.shape) for t in (A.mT, D, bias))
    of_B, of_C = torch.empty(2, sizes.parts, *B.shape)
    of_initial = torch.empty(initial.mT.shape) if initial.numel() else None
    outputs = (u, delta, z, of_A, of_B, of_C, of_D, of_bias, of_initial)
    at_last = None if dfinal is None else exact(dfinal.mT)
    dy = dy.contiguous()
    library(SOURCE).run(
        named("backward", dy),
        sizes.rows * sizes.parts,
        dy.numel() * sizes.states,
        sizes,
        arguments.inputs,
        pointer(kept),
        pointer(dy),
        pointer(at_last),
        Outputs(*map(pointer, outputs)),
    )
    A.copy_(of_A.sum(0).mT)
    for total, parts in ((B, of_B), (C, of_C), (D, of_D), (bias, of_bias)):
        torch.sum(parts, 0, out=total)
    if of_initial is not None:
        initial.copy_(of_initial.mT)


_scan = operation("cpp", forward, backward, kept_shape)


def cpp(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `reference`; u, delta and z of different dtypes are read as fp32."""
    dtype = u.dtype
    if delta.dtype != dtype or (z is not None and z.dtype != dtype):
        u, delta, z = u.float(), delta.float(), None if z is None else z.float()
    y, last = _scan(u, delta, A, B, C, D, z, delta_bias, initial, reset)
    return y.to(dtype), last
