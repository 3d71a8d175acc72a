"""What was measured on GPUs: kernels/tuned/<sm_NN>.json, one file per architecture, written by `bench kernels --tune`.

`{"device", "commit", "versions", "measured": {op: {implementation: {"speedup", "memory_saved", "shapes"}}},
"launch": {kernel: [{"key": {name: value}, "choice": {name: value}}]}}`. `speedup`: seconds of the compiled reference
over those of the implementation, forward and backward, the least over the measured shapes; `memory_saved`: share of its
peak memory, the least too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kernels.device import Gpu, gpu_of

__all__ = ["FOLDER", "Asked", "asked", "forced", "forget", "launch", "path_of", "read", "verdict", "worth"]

WARPS, STAGES = (2, 4, 8, 16), (1, 2, 3, 4, 5)  # what any kernel can be launched with
FOLDER = Path(__file__).with_name("tuned")
MIN_SPEEDUP, MIN_MEMORY_SAVED = 1.05, 0.30  # of an implementation that is worth its code


def verdict(op: str, implementation: str, gpu: Gpu | None) -> tuple[bool, str]:
    """Whether the committed measurement on this architecture is in favour of an implementation, and what it says."""
    if gpu is None:
        return False, "no GPU"
    found = read(gpu.name).get("measured", {}).get(op, {}).get(implementation)
    if found is None:
        return False, f"not measured on {gpu.name}"
    said = f"{found['speedup']:.2f} x the compiled reference, {found['memory_saved']:.0%} less memory on {gpu.name}"
    return worth(found), said


def worth(found: Mapping[str, float]) -> bool:
    """Whether an implementation of this `speedup` and `memory_saved` is worth its code."""
    return found["speedup"] >= MIN_SPEEDUP or found["memory_saved"] >= MIN_MEMORY_SAVED


@dataclass(frozen=True)
class Asked:
    """A launch that asked for its choice: the kernel, sizes rounded up, what the heuristic says, what may be tried."""

    kernel: str
    key: Mapping[str, int | str]
    default: Mapping[str, Any]
    vary: Mapping[str, Sequence[Any]]


_asked: list[list[Asked]] = []
_forced: dict[str, Mapping[str, Any]] = {}


def launch(
    kernel: str,
    device: torch.device,
    key: Mapping[str, int | str],
    default: dict[str, Any],
    vary: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, Any]:
    """The tuned launch choice of a kernel for these sizes, or `default`, the heuristic one: block sizes, `num_warps`,
    `num_stages`. Sizes are rounded up to powers of two. All processes of a run read the same file: no choice is made by
    timing while training. `vary`: values that `bench kernels --tune` may try for further names of `default`; any value
    of a block size that gives right results."""
    wanted = {name: _bucket(value) for name, value in key.items()}
    tries = {name: v for name, v in (("num_warps", WARPS), ("num_stages", STAGES)) if name in default}
    for found in _asked:
        found.append(Asked(kernel, wanted, dict(default), {**(vary or {}), **tries}))
    if kernel in _forced:
        return {**default, **_forced[kernel]}
    gpu = gpu_of(device)
    for entry in read(gpu.name).get("launch", {}).get(kernel, []) if gpu else []:
        if entry["key"] == wanted:
            return {**default, **entry["choice"]}
    return default


@contextmanager
def asked() -> Iterator[list[Asked]]:
    """Collects every launch of the body, in order."""
    found: list[Asked] = []
    _asked.append(found)
    try:
        yield found
    finally:
        _asked[:] = [other for other in _asked if other is not found]


@contextmanager
def forced(kernel: str, choice: Mapping[str, Any]) -> Iterator[None]:
    """In the body this kernel is launched so, whatever the sizes: to test and time a choice."""
    before = _forced.get(kernel)
    _forced[kernel] = choice
    try:
        yield
    finally:
        _forced.pop(kernel)
        if before is not None:
            _forced[kernel] = before


def _bucket(value: int | str) -> int | str:
    return value if isinstance(value, str) else 1 << max(0, value - 1).bit_length()


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


@cache
def read(name: str) -> dict[str, Any]:
    """What is committed for an architecture (sm_90); {} where nothing is."""
    path = path_of(name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def forget() -> None:
    """After a file was written."""
    read.cache_clear()
