"""Calls of operations as their SPECs draw them, in unlike layouts, and what the reference says about them in fp64."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import CPP, KERNELS, REFERENCE, TRITON, tuned
from kernels.against import deviation, gradients, in_fp64, upstream
from kernels.grouped_linear import GROUPED_MM
from kernels.spec import Sample, Spec, spec_of
from naming import load
from tests.kernels.interpret import interpreted

__all__ = [
    "CASES",
    "FIRST",
    "LAUNCHED",
    "LAYOUTS",
    "OPERATIONS",
    "UPSTREAM",
    "asked_by",
    "close",
    "drawn",
    "exactly",
    "gradients",
    "upstream",
]

OURS = (TRITON, GROUPED_MM, CPP)  # implementations that are operations of torch.library
OPERATIONS = [(op, name) for op, kernel in KERNELS.items() for name in OURS if name in kernel.implementations]
LAUNCHED = [op for op, name in OPERATIONS if name == TRITON]
CASES = [(op, name, size) for op, name in OPERATIONS for size in spec_of(op).small]
FIRST = [(op, name, next(iter(spec_of(op).small))) for op, name in OPERATIONS]


def drawn(op: str, size: str, dtype: torch.dtype = torch.float32) -> tuple[Spec, Sample]:
    spec = spec_of(op)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{op} {size}".encode()))
    return spec, spec.sample(spec.small[size], torch.device("cpu"), dtype, generator)


def run_of(op: str, name: str = TRITON) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """An implementation."""
    return load(KERNELS[op].implementations[name].where)


def asked_by(op: str, size: str) -> list[tuned.Asked]:
    """The launches of a call and of its gradients."""
    _, sample = drawn(op, size)
    with interpreted(), tuned.asked() as launches:
        found = sample.call(run_of(op))
        gradients(found, sample, upstream(found))
    return launches


def exactly(op: str, sample: Sample) -> tuple[Sample, tuple[Tensor, ...]]:
    """The same call of the reference, in fp64."""
    exact = in_fp64(sample)
    return exact, exact.call(run_of(op, REFERENCE))


def rubbish(t: Tensor) -> Tensor:
    """Like t, of what nobody may read: NaN, or a number that is no index."""
    return torch.full_like(t, torch.nan if t.is_floating_point() else 2**30)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(t: Tensor) -> Tensor:
    return torch.stack((t, rubbish(t)), -1).flatten(-2)[..., ::2] if t.ndim else t


def part_of_a_row(t: Tensor) -> Tensor:
    """As one of three that a fused projection computes: rows three times as long, ours in the middle."""
    if not t.ndim:
        return t
    return torch.cat((rubbish(t), t, rubbish(t)), -1)[..., t.shape[-1] : 2 * t.shape[-1]]


def rows_far_apart(t: Tensor) -> Tensor:
    """Rows (of more than two axes: what the last two hold) so far from each other that the offset of the last does not
    fit into 31 bits. The memory in between is never touched and costs nothing; of fewer than five it is too much."""
    lead = max(1, t.ndim - 2)
    count = t.shape[:lead].numel()
    if t.ndim < 2 or not t.numel() or count < 5:
        return t
    far = -(-(2**31) // (count - 1))
    apart = torch.empty_strided(
        (count, *t.shape[lead:]), (far, *t[0].contiguous().stride()[lead - 1 :]), dtype=t.dtype
    )
    return apart.copy_(t.reshape(apart.shape)).unflatten(0, t.shape[:lead])


def in_a_buffer(t: Tensor) -> Tensor:
    """From its third element on of a larger buffer: not aligned to 16 bytes."""
    buffer = torch.cat((rubbish(t).flatten()[:1].expand(3), t.flatten(), rubbish(t).flatten()[:1].expand(29)))
    return buffer[3 : 3 + t.numel()].view(t.shape) if t.numel() else t


LAYOUTS = (transposed, every_second, part_of_a_row, rows_far_apart, in_a_buffer)


def expanded(t: Tensor) -> Tensor:
    """One number everywhere, as the gradient of `y.sum()` is."""
    return t.flatten()[:1].view((1,) * t.ndim).expand(t.shape) if t.numel() else t


UPSTREAM = (expanded, *LAYOUTS)


def close(found: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    worst = deviation(found, exact)
    assert worst <= tolerance, f"{what}: off by {worst:.3g} of the largest value"
