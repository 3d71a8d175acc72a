"""What a run was: code, versions, hardware, data, sizes. Written once per start to manifest.json."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

__all__ = ["anonymous_memory_bytes", "collect_environment", "peak_flops", "peak_memory_bytes"]

# Dense bf16/fp16 tensor-core peaks in FLOP/s, from the vendors' datasheets.
_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that MFU is measured against, or None where no peak is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocated on a CUDA device, resident set of the process elsewhere. 0 where the system
    does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # First this, as getrusage counts what the process that started this one had in use.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def anonymous_memory_bytes() -> int:
    """What this process has in memory now that is no page of a file: mapped pages count as resident, and the system
    takes them back when it likes. 0 where the system does not say."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1]) * 1024
    return 0


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], capture_output=True, timeout=5, cwd=Path(__file__).resolve().parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none, some containers hide it
        return None


def collect_environment(device: torch.device) -> dict[str, Any]:
    import numpy

    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(changed) if changed is not None else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": _load_average(),
    }
