"""What was measured on GPUs: kernels/tuned/<sm_NN>.json, one file per architecture, written by `bench kernels --tune`.

`{"device", "commit", "versions", "measured": {op: {implementation: {"speedup", "memory_saved", "shapes"}}},
"launch": {kernel: [{"key": {name: value}, "choice": {name: value}}]}}`. `speedup`: seconds of the compiled reference
over those of the implementation, forward and backward, the least over the measured shapes; `memory_saved`: share of the
reference's peak memory, the least too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kernels.device import Gpu, gpu_of

__all__ = ["FOLDER", "launch", "verdict"]

FOLDER = Path(__file__).with_name("tuned")
MIN_SPEEDUP, MIN_MEMORY_SAVED = 1.05, 0.30  # of an implementation that is worth its code


def verdict(op: str, implementation: str, gpu: Gpu | None) -> tuple[bool, str]:
    """Whether the committed measurement on this architecture is in favour of an implementation, and what it says."""
    if gpu is None:
        return False, "no GPU"
    found = _read(gpu.name).get("measured", {}).get(op, {}).get(implementation)
    if found is None:
        return False, f"not measured on {gpu.name}"
    speedup, saved = found["speedup"], found["memory_saved"]
    said = f"{speedup:.2f} x the compiled reference, {saved:.0%} less memory on {gpu.name}"
    return speedup >= MIN_SPEEDUP or saved >= MIN_MEMORY_SAVED, said


def launch(
    kernel: str, device: torch.device, key: Mapping[str, int | str], default: dict[str, Any]
) -> dict[str, Any]:
    """The tuned launch choice of a kernel for these sizes, or `default`, the heuristic one: block sizes, `num_warps`,
    `num_stages`. Sizes are rounded up to powers of two. All processes of a run read the same file: no choice is made by
    timing while training."""
    gpu = gpu_of(device)
    if gpu is None:
        return default
    wanted = {name: _bucket(value) for name, value in key.items()}
    for entry in _read(gpu.name).get("launch", {}).get(kernel, []):
        if entry["key"] == wanted:
            return {**default, **entry["choice"]}
    return default


def _bucket(value: int | str) -> int | str:
    return value if isinstance(value, str) else 1 << max(0, value - 1).bit_length()


@cache
def _read(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
