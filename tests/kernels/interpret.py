"""Triton kernels run by Triton's interpreter, on tensors of the CPU, beside everything else in one process.

What the interpreter would hide is looked for: a masked load without `other` reads 0 there and anything on a GPU, so
here it reads NaN; programs run one after another, so two that store to one address would not be noticed, and are an
error; so is an address outside of every tensor that the kernel was given (an offset that wrapped, a tile past the
end).

It cannot show: arithmetic in bf16 (operands must be raised to fp32 where they are loaded; stores to bf16 truncate),
TF32 products, and what a compiler does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kernels import device
from tests.kernels.memory import allocations

__all__ = ["interpreted", "poisoned"]


def _yes() -> bool:
    return True


@contextmanager
def interpreted() -> Iterator[None]:
    """In the body every launch of a Triton kernel is interpreted, and the rule of choice knows it."""
    if device.interpreting is _yes:  # within another
        yield
        return
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
    from triton.runtime.jit import JITFunction

    made: dict[Any, InterpretedFunction] = {}

    def function(jitted: JITFunction) -> InterpretedFunction:
        return made.setdefault(jitted.fn, InterpretedFunction(jitted.fn))

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        owners.clear()
        spans[:] = [span for arg in (*args, *options.values()) if (span := _span(arg))]
        function(self).run(*args, grid=grid, warmup=False, **options)

    def device_function(self: JITFunction, *args: Any, **options: Any) -> Any:
        """Called from within a kernel: tl.sum and our own helpers. The interpreter's own would leave tl patched."""
        scope = interpreter._patch_lang(function(self).fn)
        try:
            return function(self).rewrite()(*args, **options)
        finally:
            scope.restore()

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    owners: dict[int, tuple[int, ...]] = {}  # address -> the program that stored there
    spans: list[tuple[int, int]] = []  # of the tensors of this launch: first byte, one past the last

    def touched(self: Any, ptrs: Any, mask: Any, what: str) -> np.ndarray:
        """The addresses; an error if one lies outside of what the kernel was given."""
        wanted = mask.data.astype(bool)  # numbers, where a scalar was part of it
        addresses = np.broadcast_to(ptrs.data, wanted.shape)[wanted].ravel().astype(np.uint64)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, end in spans:
            inside |= (addresses >= first) & (addresses + size <= end)
        if not inside.all():
            raise AssertionError(f"program {tuple(self.grid_idx)} would {what} outside of its tensors")
        return addresses

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        touched(self, ptrs, mask, "load")
        found = load(self, ptrs, mask, other, *rest)
        if other is None:
            kind = found.data.dtype
            nothing = np.nan if np.issubdtype(kind, np.floating) else np.iinfo(kind).max
            found.data = np.where(mask.data, found.data, kind.type(nothing))
        return found

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        program = tuple(self.grid_idx)
        for address in touched(self, ptrs, mask, "store").tolist():
            if owners.setdefault(address, program) != program:
                raise AssertionError(f"programs {owners[address]} and {program} store to one address")
        return store(self, ptrs, value, mask, *rest)

    originals = JITFunction.run, JITFunction.__call__, device.interpreting
    JITFunction.run, JITFunction.__call__ = run, device_function
    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store
    device.interpreting = _yes
    try:
        yield
    finally:
        JITFunction.run, JITFunction.__call__, device.interpreting = originals
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def _span(arg: Any) -> tuple[int, int] | None:
    """The bytes that a tensor, or the tensor behind a descriptor, reaches over."""
    t = getattr(arg, "base", arg)
    if not isinstance(t, torch.Tensor) or not t.numel():
        return None
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


@contextmanager
def poisoned() -> Iterator[None]:
    """In the body `torch.empty` and its kin hold NaN (integers: a large number), as if memory were used: what a kernel
    does not write shows."""

    def fill(t: torch.Tensor) -> torch.Tensor:
        return t.fill_(float("nan") if t.is_floating_point() else 2**30) if t.dtype != torch.bool else t

    with allocations(fill):
        yield
