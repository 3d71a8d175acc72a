"""Kernels compiled for GPUs that are not here, by their real launchers, on tensors without storage.

    with ahead_of_time(H100) as binaries:
        loss = op(torch.empty(65536, 768, dtype=torch.bfloat16, device="meta", requires_grad=True), ...)
        loss.backward()

Every kernel that this would start is compiled, for the specialisations (divisibility by 16, constants) it would get,
and described by what its binary says. Works without a GPU and without CUDA: Triton brings its assembler along.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from kernels.device import Gpu, as_if

__all__ = ["Binary", "active", "ahead_of_time"]

_depth: list[Gpu] = []


def active() -> bool:
    """Whether kernels are being compiled instead of run."""
    return bool(_depth)


@dataclass
class Binary:
    """One compiled kernel. `shared` bytes a program uses, `warps` it has; `ttir`: what it was compiled from."""

    kernel: str
    gpu: Gpu
    cubin: bytes = field(repr=False)
    ttir: str = field(repr=False)
    shared: int
    warps: int

    @cached_property
    def _usage(self) -> dict[str, int]:
        said = _tool("cuobjdump", self.cubin, "-res-usage")
        return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}

    @property
    def registers(self) -> int:
        """Of each thread."""
        return self._usage["REG"]

    @property
    def spilled(self) -> int:
        """Bytes of each thread that did not fit into registers."""
        return self._usage["STACK"] + self._usage.get("LOCAL", 0)

    @cached_property
    def instructions(self) -> frozenset[str]:
        """Instructions of its code: `LDG.E.128`, `LDGSTS.E.BYPASS.128`, `HGMMA.64x128x16.F32.BF16`."""
        code = _tool("nvdisasm", self.cubin, "-c")
        return frozenset(
            re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
        )

    def has(self, *parts: str) -> bool:
        """Whether one instruction holds all of these parts: has("LDG", "128")."""
        return any(all(part in name.split(".") for part in parts) for name in self.instructions)


@contextmanager
def ahead_of_time(gpu: Gpu) -> Iterator[list[Binary]]:
    """In the body kernels are compiled for `gpu` where they would be launched; needs Triton, not a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction, KernelInterface

    class Driver:  # what Triton asks of the driver of a GPU, as far as compiling goes
        capability = gpu.capability[0] * 10 + gpu.capability[1]

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.capability, 32)

        def get_current_device(self) -> int:
            return self.capability  # compiled kernels are kept by number of device

        def get_current_stream(self, device: Any = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("meta")

    found: list[Binary] = []
    run, getitem = JITFunction.run, KernelInterface.__getitem__

    def compile_only(self: Any, *args: Any, grid: Any = None, warmup: bool = True, **options: Any) -> Any:
        made = run(self, *args, grid=grid, warmup=True, **options)
        binary = Binary(
            self.__name__,
            gpu,
            made.asm["cubin"],
            made.asm["ttir"],
            made.metadata.shared,
            made.metadata.num_warps,
        )
        if all(binary.cubin != other.cubin for other in found):  # a loop launches one kernel many times
            found.append(binary)
        return made

    # One driver a process is what Triton knows; its own is asked for again afterwards, if there is one.
    drivers = triton.runtime.driver
    drivers.set_active(Driver())
    JITFunction.run = compile_only
    KernelInterface.__getitem__ = lambda self, grid: partial(self.run, grid=grid, warmup=True)
    _depth.append(gpu)
    try:
        with as_if(gpu):
            yield found
    finally:
        _depth.pop()
        JITFunction.run, KernelInterface.__getitem__ = run, getitem
        if torch.cuda.is_available():
            drivers.reset_active()
        else:
            drivers._active = None


def _tool(name: str, cubin: bytes, option: str) -> str:
    """What a program of the CUDA toolkit, which lies in Triton's package, says about a binary."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([program, option, file.name], capture_output=True, encoding="utf-8", check=True)
    return done.stdout
