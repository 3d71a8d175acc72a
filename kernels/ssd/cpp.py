"""State-space duality on a CPU: products by torch, what lies between them compiled. See passes.cpp.

Shapes: B rows, K chunks of Q tokens, H heads of P channels, G groups, N states.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from kernels import CPP, KERNELS
from kernels.cpp import library, named, pointer
from kernels.library import opaque
from kernels.ssd.chunked import by_products

__all__ = ["cpp"]

SOURCE = str(KERNELS["ssd"].implementations[CPP].source)


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("groups", "heads", "length")]


class Inputs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("steps", "A", "D", "run")]


class Carry(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("chunks", "heads", "states", "back")]


class Outputs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weights", "products", "steps", "logs", "D")]


class Given:
    """The arguments as the kernel reads them, and kept alive while it does."""

    def __init__(
        self, products: Tensor, steps: Tensor, A: Tensor, D: Tensor | None, run: Tensor | None
    ) -> None:
        rows, chunks, groups, length, _ = products.shape
        self.items = rows * chunks * groups
        self.sizes = Sizes(groups, steps.shape[3] // groups, length)
        self.products = products.contiguous()
        self.tensors = (
            steps.transpose(2, 3).contiguous(),  # (B, K, H, Q)
            A.contiguous(),
            None if D is None else D.contiguous(),
            None if run is None else run.to(torch.int32).contiguous(),
        )
        self.inputs = Inputs(*map(pointer, self.tensors))


def _weights(products: Tensor, steps: Tensor, A: Tensor, D: Tensor | None, run: Tensor | None) -> Tensor:
    given, made = Given(products, steps, A, D, run), _like_weights(products, steps)
    library(SOURCE).run(
        named("weights", products),
        given.items,
        made.numel(),
        given.sizes,
        given.inputs,
        pointer(given.products),
        pointer(made),
    )
    return made


def _like_weights(products: Tensor, steps: Tensor, *args: Any) -> Tensor:
    rows, chunks, length, heads = steps.shape
    return products.new_empty(rows, chunks, heads, length, length)


def _pulled(
    pairs: Tensor,
    products: Tensor,
    steps: Tensor,
    A: Tensor,
    D: Tensor | None,
    run: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given, pairs = Given(products, steps, A, D, run), pairs.contiguous()
    weights, dproducts, dsteps, dlogs, dD = made = _like_pulled(pairs, products, steps, A, D)
    of_chunks = None if D is None else steps.new_empty(*steps.shape[:2], len(D))
    outputs = Outputs(*map(pointer, (weights, dproducts, dsteps.mT, dlogs.mT, of_chunks)))
    library(SOURCE).run(
        named("pulled", products),
        given.items,
        pairs.numel(),
        given.sizes,
        given.inputs,
        pointer(pairs),
        pointer(given.products),
        outputs,
    )
    if of_chunks is not None:
        torch.sum(of_chunks, (0, 1), out=dD)
    return made


def _like_pulled(
    pairs: Tensor, products: Tensor, steps: Tensor, A: Tensor, D: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty(pairs.shape, dtype=pairs.dtype, device=pairs.device),
        torch.empty(products.shape, dtype=products.dtype, device=products.device),
        steps.new_empty(steps.mT.shape).mT,  # written head by head
        steps.new_empty(steps.mT.shape).mT,
        steps.new_empty(0 if D is None else len(D)),
    )


def _carried(added: Tensor, decay: Tensor, state: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    rows, chunks, heads, width, states = added.shape
    met, last = (
        torch.empty_like(added, memory_format=torch.contiguous_format),
        state.clone(memory_format=torch.contiguous_format),
    )
    added, decay = added.contiguous(), decay.contiguous()
    library(SOURCE).run(
        named("carried", added),
        rows * heads,
        added.numel(),
        Carry(chunks, heads, width * states, back),
        pointer(added),
        pointer(decay),
        pointer(last),
        pointer(met),
    )
    return met, last


def _like_carried(added: Tensor, decay: Tensor, state: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    made = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (added, state))
    return next(made), next(made)


class _Compiled:
    weights = staticmethod(opaque("ssd_weights", _weights, _like_weights))
    pulled = staticmethod(opaque("ssd_pulled", _pulled, _like_pulled))
    carried = staticmethod(opaque("ssd_carried", _carried, _like_carried))


cpp = by_products(_Compiled())
