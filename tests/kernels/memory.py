"""What kernels are given to write to: memory between bands that nobody may touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["allocations", "guarded"]

BAND = 512  # elements on either side: tiles that run over by a row or two, alignment as it was


@contextmanager
def allocations(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In the body `torch.empty` and its kin give `change` of what they make, but of tensors that hold no data: those of
    the meta device, and those that a compiler traces with."""
    names = ("empty", "empty_like", "empty_strided")
    originals = {name: getattr(torch, name) for name in names}
    new_empty = Tensor.new_empty

    def changed(t: Tensor) -> Tensor:
        with torch.no_grad():
            return t if t.device.type == "meta" or isinstance(t, FakeTensor) else change(t)

    for name, original in originals.items():
        setattr(torch, name, lambda *a, original=original, **k: changed(original(*a, **k)))
    Tensor.new_empty = lambda self, *a, **k: changed(new_empty(self, *a, **k))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
        Tensor.new_empty = new_empty


@contextmanager
def guarded() -> Iterator[None]:
    """In the body new memory lies in larger buffers; an error at its end if anything was written beside it."""
    buffers: list[tuple[Tensor, Tensor, int]] = []  # buffer, as it was, elements of a tensor
    full = torch.full

    def inside(t: Tensor) -> Tensor:
        if not t.numel() or t.dtype == torch.bool:
            return t
        length = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        rubbish = torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max
        buffer = full((length + 2 * BAND,), rubbish, dtype=t.dtype, device=t.device)
        buffers.append((buffer, buffer[:BAND].clone(), length))
        return buffer.as_strided(t.shape, t.stride(), BAND)

    with allocations(inside):
        yield
    for buffer, band, length in buffers:
        for found in (buffer[:BAND], buffer[BAND + length :]):
            same = torch.where(found.isnan(), band.isnan(), found == band)
            assert bool(same.all()), "a kernel wrote beside what it was given"
