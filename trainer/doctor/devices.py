"""Processors, memory and GPUs, and whether torch can use what is there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.doctor.lines import Line, note, ok, problem, said_by, size, tried

__all__ = ["check"]

LEAST_CAPABILITY = (7, 0)  # of GPUs that torch's wheels and the compiler are made for
BUSY = 0.5  # of a GPU's memory: less than this free, somebody else is on it


def check() -> Iterator[Line]:
    import torch

    yield from tried("cpu", _cpu, torch)
    yield from tried("memory", _memory)
    yield from tried("gpu", _gpus, torch, _driver())
    if torch.backends.mps.is_available():
        yield ok("mps", "usable")
    yield from tried("a run", _run)


def _gpus(torch: Any, driver: str) -> Iterator[Line]:
    if driver:
        yield ok("driver", driver)
    if not torch.cuda.is_available():
        yield _no_gpu(torch, driver)
        return
    for index in range(torch.cuda.device_count()):
        yield from tried(f"cuda:{index}", _gpu, torch, index)
    if torch.cuda.device_count() > 1:
        yield _shared_memory()


def _cpu(torch: Any) -> Line:
    cores, threads = _cores(), torch.get_num_threads()
    model = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    text = f"{model}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}, torch computes on {threads} threads"
    if threads > cores:
        return problem("cpu", text, f"more threads than cores are slow: set OMP_NUM_THREADS={cores}")
    return ok("cpu", text)


def _cores() -> int:
    """Those that this process may use: fewer than there are in a container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))  # "max" is no number
    return cores


def _memory() -> Line:
    found: dict[str, int] = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            found[name] = int(value.split()[0]) * 1024
        total, free = found["MemTotal"], found["MemAvailable"]
    except (OSError, KeyError):
        return note("memory", "the system does not say how much there is")
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        total, free = min(total, limit), min(free, limit)
    text = f"{size(free)} of {size(total)} available"
    if free < 2e9:
        return problem("memory", text, "end other programs: torch alone takes some 0.5 GB for each process")
    return ok("memory", text)


def _driver() -> str:
    """NVIDIA's, "" where there is none."""
    if not (program := shutil.which("nvidia-smi")):
        return ""
    asked = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(asked, capture_output=True, timeout=15, encoding="utf-8", errors="replace")
        if not done.returncode and done.stdout.strip():
            return "; ".join(dict.fromkeys(done.stdout.strip().splitlines()))
    return ""


def _no_gpu(torch: Any, driver: str) -> Line:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not driver:
        return ok("gpu", "none, runs take the CPU" if not torch.version.cuda else "none that a driver knows")
    if torch.version.cuda is None and not getattr(torch.version, "hip", None):
        return problem(
            "gpu",
            f"there is one ({driver}), and torch {torch.__version__} was built without CUDA",
            "install a torch with CUDA: https://pytorch.org/get-started/locally",
        )
    if hidden is not None:
        why = f"there is one ({driver}), hidden by CUDA_VISIBLE_DEVICES={hidden!r}"
        return problem("gpu", why, "unset CUDA_VISIBLE_DEVICES, or name one that exists")
    try:
        torch.cuda.init()
        why = "torch does not say why"
    except Exception as error:
        why = said_by(error)
    return problem(
        "gpu",
        f"there is one ({driver}) that torch cannot use: {why}",
        f"a driver for CUDA {torch.version.cuda} or later, or a torch for this driver's CUDA",
    )


def _gpu(torch: Any, index: int) -> Line:
    about = f"cuda:{index}"
    try:
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        torch.ones(8, device=about).sum().item()
    except Exception as error:
        remedy = "end what else runs on it (nvidia-smi), restart its driver, or leave it out by CUDA_VISIBLE_DEVICES"
        return problem(about, f"cannot be used: {said_by(error)}", remedy)
    capability, cuda = (properties.major, properties.minor), torch.version.cuda
    text = f"{properties.name}, sm_{capability[0]}{capability[1]}, {size(free)} of {size(total)} free, CUDA {cuda}"
    if capability < LEAST_CAPABILITY:
        return problem(
            about, text, "too old for torch's compiler and for kernels of ours: set torch_compile=false"
        )
    if free < BUSY * total:
        return note(about, text, "somebody else is on it: see nvidia-smi")
    return ok(about, text)


def _shared_memory() -> Line:
    try:
        free = shutil.disk_usage("/dev/shm").total
    except OSError:
        return note("shared memory", "there is no /dev/shm", "NCCL wants it between GPUs: NCCL_SHM_DISABLE=1")
    if free < 1e9:
        return problem(
            "shared memory",
            f"/dev/shm has {size(free)}",
            "NCCL wants more: docker run --shm-size=8g or --ipc=host",
        )
    return ok("shared memory", f"/dev/shm has {size(free)}")


def _run() -> Line:
    """What a run takes where nothing is said."""
    from trainer.distributed import choose_device
    from trainer.precision import choose_precision, should_compile

    device = choose_device("auto")
    precision, why = choose_precision("auto", device)
    compiled, why_not = should_compile("auto", device)
    format_ = "fp32" if precision == "no" else precision
    text = f"runs take {device}, {format_} ({why}), {'compiled blocks' if compiled else 'eager'}"
    if why_not:
        return problem(
            "a run", f"{text} ({why_not})", "install a compiler (apt install gcc g++): blocks run faster"
        )
    return ok("a run", text)
