"""What a machine has, without importing torch: `--help` and a typing mistake need not wait 1.5 s."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any


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


def uses_cuda(device: str) -> bool:
    """Whether the field `device` ends up on CUDA here."""
    return device.startswith("cuda") or (device == "auto" and cuda_device_count() > 0)


def process_count(num_gpus: int | str, device: str) -> int:
    """Processes of a run that no launcher started: `num_gpus`, where auto is every visible GPU, else one."""
    if num_gpus != "auto":
        return int(num_gpus)
    whole_machine = device in ("auto", "cuda")
    return max(1, cuda_device_count()) if whole_machine else 1


def world_size(num_gpus: Any, device: str) -> int:
    """Processes of this run: those a launcher started, else as many as the config asks for."""
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return process_count(num_gpus if type(num_gpus) is int else "auto", device)
