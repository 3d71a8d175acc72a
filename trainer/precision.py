"""Number formats and the switches of the numerical back end."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shlex
import shutil
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from configs.schema import RunConfig

# What torch compiles for a CPU with, unless the environment's CXX names another.
CXX = "clang++" if platform.system() == "Darwin" else "g++"

__all__ = ["LossScaler", "autocast", "choose_precision", "should_compile", "tune_host"]


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """(precision, reason): "no" (fp32), "bf16" or "fp16".

    `auto` is bf16 where the hardware multiplies it natively. On CPUs with AVX512-BF16 that trains 1.7 times
    faster than fp32; elsewhere on CPU bf16 is emulated and slower.
    """
    if requested != "auto":
        if requested == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("mixed_precision: this GPU has no bf16. Use fp16 or no")
        return requested, "as configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU supports it"
        return "fp16", "the GPU has no bf16"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bf16", "the CPU has AVX512-BF16"
    return "no", f"no native bf16 on this {device.type} device"


def autocast(precision: str, device: torch.device) -> Any:
    """A fresh context manager for one forward pass."""
    if precision == "no":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def should_compile(requested: str | bool, device: torch.device) -> tuple[bool, str]:
    """(whether, why not): `auto` compiles on CUDA only, as on CPU it gains 0 to 5 % after 7 to 24 s of compilation, and
    where there is a compiler."""
    if requested is False or (requested == "auto" and device.type != "cuda"):
        return False, ""
    name, compilers = ("CC", ["gcc", "clang"]) if device.type == "cuda" else ("CXX", [CXX])
    compilers = shlex.split(os.environ.get(name, ""))[:1] or compilers
    if platform.system() == "Windows" or any(map(shutil.which, compilers)):
        return True, ""
    missing = f"no {' or '.join(compilers)} on PATH"
    if requested == "auto":
        return False, f"not compiled: {missing}"
    raise ValueError(
        f"torch_compile: true needs a compiler, and there is {missing}. Install one (apt install g++, or {name}=<its "
        f"path>), or set torch_compile=false"
    )


def tune_host(cfg: RunConfig, device: torch.device) -> None:
    """Process-wide switches, set once before any tensor is made."""
    if cfg.deterministic:
        # cuBLAS reads this when its handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    _keep_freed_pages()


@functools.cache
def _keep_freed_pages() -> None:
    """Activations are freed and asked for again every step; without this, glibc gives the pages back to the kernel each
    time (6 to 11 % of a CPU step). Once a process: each call makes the allocator tidy up first."""
    if not _on_glibc():
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc.mallopt(m_mmap_threshold, 2**31 - 1)
    libc.mallopt(m_trim_threshold, -1)


def _on_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):  # another system, or another C library
        return False


class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al., 2018, arXiv 1710.03740), all on the device.

    Doubles after `growth_interval` good steps, halves after an overflow. Off (scale 1) for other precisions.
    """

    def __init__(self, enabled: bool, device: torch.device, growth_interval: int = 2000) -> None:
        self.enabled = enabled
        self.growth_interval = growth_interval
        self.scale = torch.tensor(2.0**16 if enabled else 1.0, device=device)
        self.good_steps = torch.tensor(0.0, device=device)

    def unscale(self, gradients: list[Tensor]) -> None:
        if self.enabled:
            torch._foreach_mul_(gradients, self.scale.reciprocal())

    def update(self, found_inf: Tensor) -> None:
        """`found_inf`: fp32 scalar, 1.0 when this step overflowed."""
        if not self.enabled:
            return
        self.good_steps = torch.where(found_inf > 0, torch.zeros_like(self.good_steps), self.good_steps + 1)
        grow = self.good_steps >= self.growth_interval
        factor = torch.where(found_inf > 0, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale = self.scale * factor
        self.good_steps = torch.where(grow, torch.zeros_like(self.good_steps), self.good_steps)

    def state_dict(self) -> dict[str, Any]:
        return {
            "enabled": self.enabled,
            "scale": self.scale.item(),
            "good_steps": self.good_steps.item(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is taken where one of the two is off: another precision is another scale. States that do not say so
        yet are of an enabled one if there is a scale."""
        if self.enabled and state.get("enabled", state["scale"] != 1.0):
            self.scale.fill_(state["scale"])
            self.good_steps.fill_(state["good_steps"])
