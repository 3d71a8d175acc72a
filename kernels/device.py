"""What a kernel's launch and the rule of choice know of a GPU: asked here, by everybody, so that a test can answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

__all__ = ["Gpu", "as_if", "gpu_of", "interpreting"]


@dataclass(frozen=True)
class Gpu:
    """`capability` (major, minor); `sms`: streaming multiprocessors; `shared_bytes` that one program may use."""

    capability: tuple[int, int]
    sms: int
    shared_bytes: int

    @property
    def name(self) -> str:
        """As compilers and the files of kernels/tuned/ call it: sm_90."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


A100 = Gpu((8, 0), 108, 163 * 1024)
H100 = Gpu((9, 0), 132, 227 * 1024)
B200 = Gpu((10, 0), 148, 227 * 1024)

_pretended: list[Gpu] = []


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU behind `device`; None for a device of another kind."""
    if _pretended:
        return _pretended[-1]
    return _ask(device) if device.type == "cuda" and torch.cuda.is_available() else None


@cache
def _ask(device: torch.device) -> Gpu:
    p = torch.cuda.get_device_properties(device)
    shared = getattr(p, "shared_memory_per_block_optin", 99 * 1024)
    return Gpu((p.major, p.minor), p.multi_processor_count, shared)


@contextmanager
def as_if(gpu: Gpu) -> Iterator[None]:
    """In the body every device is this GPU: to compile for one that is not here, and to test what would be chosen."""
    _pretended.append(gpu)
    try:
        yield
    finally:
        _pretended.pop()


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on a CPU (TRITON_INTERPRET=1): slowly, to be looked into."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)
