"""Gated normalisation on a CPU, compiled: one pass over memory. See norm.cpp.

Shapes: N rows, D width.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from kernels import CPP, KERNELS
from kernels.cpp import library, named, pointer
from kernels.library import opaque

__all__ = ["cpp"]

SOURCE = str(KERNELS["gated_rms_norm"].implementations[CPP].source)
SLICES = 64  # of rows


class Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "groups", "slice", "z_stride")),
        ("eps", ctypes.c_float),
    ]


class Tensors(ctypes.Structure):
    """Inputs, or their gradients."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("y", "z", "weight")]


class Given:
    """The arguments as the kernel reads them, and kept alive while it does."""

    def __init__(self, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> None:
        rows, width = y.shape
        self.y, self.weight = y.contiguous(), weight.float().contiguous()
        self.z = z if z.stride(1) == 1 else z.contiguous()
        slice_ = -(-rows // SLICES)
        self.items = -(-rows // max(1, slice_))
        self.sizes = Sizes(rows, width, groups, slice_, self.z.stride(0), eps)
        self.inputs = Tensors(self.y.data_ptr(), self.z.data_ptr(), self.weight.data_ptr())


def _forward(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """y, z (N, D) of one dtype."""
    given, out = Given(y, z, weight, groups, eps), _like(y)
    library(SOURCE).run(named("forward", y), given.items, y.numel(), given.sizes, given.inputs, pointer(out))
    return out


def _like(y: Tensor, *args: Any) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def _backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    given, dout = Given(y, z, weight, groups, eps), dout.contiguous()
    dy, dz, dweight = made = _gradients(dout, y, z, weight)
    of_slices = torch.empty(given.items, y.shape[1])
    outputs = Tensors(*map(pointer, (dy, dz, of_slices)))
    library(SOURCE).run(
        named("backward", y), given.items, y.numel(), given.sizes, given.inputs, pointer(dout), outputs
    )
    torch.sum(of_slices, 0, out=dweight)
    return made


def _gradients(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(y), _like(z), torch.empty(weight.shape, dtype=torch.float32, device=y.device)


_operation = opaque("gated_rms_norm_cpp", _forward, _like)
_differentiated = opaque("gated_rms_norm_cpp_backward", _backward, _gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, z, weight, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(y, z, weight)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    y, z, weight = ctx.saved_tensors
    dy, dz, dweight = _differentiated(dout, y, z, weight, ctx.groups, ctx.eps)
    return dy, dz, dweight.to(weight.dtype), None, None


_operation.register_autograd(_differentiate, setup_context=_save)


def cpp(y: Tensor, z: Tensor, weight: Tensor, *, groups: int, eps: float) -> Tensor:
    """Arguments and result as `reference`."""
    width = y.shape[-1]
    out: Tensor = _operation(y.reshape(-1, width), z.to(y.dtype).reshape(-1, width), weight, groups, eps)
    return out.view(y.shape)
