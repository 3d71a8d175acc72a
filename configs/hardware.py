"""What a machine has, without importing torch: `--help` and a typing mistake need not wait 1.5 s."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any

from configs.messages import ConfigError

UNSET = (
    "For one process: unset RANK WORLD_SIZE. For several: num_gpus=<N>, or torchrun --nproc_per_node=<N> ..."
)


@functools.cache
def cuda_device_count() -> int:
    """CUDA devices the driver shows this process (it honours CUDA_VISIBLE_DEVICES); 0 without a driver."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def uses_cuda(device: str) -> bool:
    """Whether the field `device` ends up on CUDA here."""
    return device.startswith("cuda") or (device == "auto" and cuda_device_count() > 0)


def launched() -> bool:
    """Whether a launcher such as torchrun has started this process, be it the only one."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def process_group() -> tuple[int, int]:
    """(rank, number of processes) as a launcher says, (0, 1) without one. Raises ConfigError for what cannot be."""
    if not launched():
        return 0, 1
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ConfigError(
            f"environment: RANK={rank} WORLD_SIZE={size}: a rank is 0 or more, and less than the processes. {UNSET}"
        )
    return int(rank), int(size)


def require_meeting_place() -> None:
    """ConfigError where several processes are announced, as by a leftover in the shell, that cannot find each other."""
    rank, size = process_group()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise ConfigError(
            f"environment: RANK={rank} WORLD_SIZE={size} make this one of {size} processes, and without "
            f"{' and '.join(missing)} they do not know where to meet. {UNSET}"
        )


def process_count(num_gpus: int | str, device: str) -> int:
    """Processes of a run that no launcher started: `num_gpus`, where auto is every visible GPU, else one."""
    if num_gpus != "auto":
        return int(num_gpus)
    whole_machine = device in ("auto", "cuda")
    return max(1, cuda_device_count()) if whole_machine else 1


def world_size(num_gpus: Any, device: str) -> int:
    """Processes of this run: those a launcher started, else as many as the config asks for."""
    if launched():
        return process_group()[1]
    return process_count(num_gpus if type(num_gpus) is int else "auto", device)
