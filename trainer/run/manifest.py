"""What a run was: code, versions, hardware, data, sizes. Written once per start to manifest.json."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

__all__ = ["anonymous_memory_bytes", "collect_environment", "git_state", "peak_flops", "peak_memory_bytes"]

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


# A copy of the project brings a configuration of git with it, which may name programs to run.
_NO_PROGRAMS = ("core.fsmonitor=false", "core.hooksPath=/dev/null", "protocol.allow=never")


def _git(folder: Path, *args: str, settings: Iterable[str] = ()) -> str | None:
    """What git says of a folder, by settings of ours; None where it says nothing. It writes nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    alone = {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
    given = [word for setting in (*_NO_PROGRAMS, *settings) for word in ("-c", setting)]
    try:
        done = subprocess.run(
            ["git", *given, *args], capture_output=True, timeout=5, cwd=folder, env={**kept, **alone}
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of a folder, and whether files that are tracked have changed since; None where git does not say. No
    program that its configuration names is run: neither hooks nor monitors nor filters, and none of submodules."""
    filters = _git(folder, "config", "--name-only", "--get-regexp", r"^filter\..*\.(clean|process|required)$")
    off = [f"{name}={'false' if name.endswith('.required') else ''}" for name in (filters or "").splitlines()]
    if any("=" in name for name in (filters or "").splitlines()):
        return _git(folder, "rev-parse", "HEAD"), None  # such a name cannot be set from here
    status = ("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    changed = _git(folder, *status, settings=off)
    return _git(folder, "rev-parse", "HEAD"), bool(changed) if changed is not None else None


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none, some containers hide it
        return None


def collect_environment(device: torch.device) -> dict[str, Any]:
    import numpy

    commit, dirty = git_state(Path(__file__).resolve().parent)
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": _load_average(),
    }
