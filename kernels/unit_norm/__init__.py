"""Vectors of length 1 along the last axis (Loshchilov et al. 2024, nGPT, section 2.1).

Shapes: (..., D), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.choose import Kernels
from kernels.rms_norm import moved
from kernels.spec import Sample, Size, Spec, drawn
from kernels.unit_norm.reference import reference

__all__ = ["SPEC", "reference", "unit_norm"]


def unit_norm(x: Tensor, kernels: Kernels) -> Tensor:
    """x / ||x|| for x (..., D), in its dtype, computed in at least fp32; a vector of zeros stays one."""
    return kernels.implementation("unit_norm", device=x.device, dtype=x.dtype, columns=x.shape[-1])(x)


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, width = int(size["rows"]), int(size["width"])
    return Sample({"x": drawn(rows, width, device=device, dtype=dtype, generator=generator)})


def _flops(size: Size) -> tuple[float, float]:
    elements = int(size["rows"]) * int(size["width"])
    return 3.0 * elements, 5.0 * elements


SPEC = Spec(
    sample=_sample,
    small={
        "7 x 100": {"rows": 7, "width": 100},
        "one row": {"rows": 1, "width": 64},
        "no rows": {"rows": 0, "width": 16},
        "two columns": {"rows": 3, "width": 2},
    },
    large={"65,536 x 768": {"rows": 65_536, "width": 768}},
    timed_on_cpu={"4,096 x 192": {"rows": 4_096, "width": 192}},
    flops=_flops,
    bytes=moved,
    tolerance={"float32": 3e-6, "float16": 2e-3, "bfloat16": 2e-2},
)
