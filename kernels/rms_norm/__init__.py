"""Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019, equation 4).

Shapes: (..., D), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.choose import Kernels
from kernels.precision import compute_dtype
from kernels.rms_norm.reference import reference
from kernels.spec import Sample, Size, Spec, drawn

__all__ = ["SPEC", "reference", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, kernels: Kernels) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight for x (..., D), weight (D,) or None for ones; returned in the dtype of the
    product that reads it, statistics in at least fp32. Differentiable in x and weight."""
    run = kernels.implementation("rms_norm", device=x.device, dtype=x.dtype, columns=x.shape[-1])
    return run(x, weight, eps=eps, out_dtype=compute_dtype(x))


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, width = int(size["rows"]), int(size["width"])
    x = drawn(rows, width, device=device, dtype=dtype, generator=generator)
    weight = drawn(width, device=device, dtype=dtype, generator=generator) if size["weight"] else None
    return Sample({"x": x, "weight": weight}, {"eps": 1e-5, "out_dtype": dtype})


def _flops(size: Size) -> tuple[float, float]:
    elements = int(size["rows"]) * int(size["width"])
    return 4.0 * elements, 8.0 * elements


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """x in and y out; dy and x in, dx out."""
    elements = int(size["rows"]) * int(size["width"])
    return 2.0 * elements * itemsize, 3.0 * elements * itemsize


SPEC = Spec(
    sample=_sample,
    small={
        "7 x 100": {"rows": 7, "width": 100, "weight": True},
        "no weight": {"rows": 5, "width": 129, "weight": False},
        "one row": {"rows": 1, "width": 64, "weight": True},
        "no rows": {"rows": 0, "width": 16, "weight": True},
        "two columns": {"rows": 3, "width": 2, "weight": True},
    },
    large={
        "65,536 x 768": {"rows": 65_536, "width": 768, "weight": True},
        "16,384 x 2,048": {"rows": 16_384, "width": 2_048, "weight": True},
    },
    timed_on_cpu={"4,096 x 192": {"rows": 4_096, "width": 192, "weight": True}},
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2},
    peers={"torch": "kernels.rms_norm.peers:of_torch", "liger": "kernels.rms_norm.peers:of_liger"},
)
