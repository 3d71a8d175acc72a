"""A step along the sphere from one hidden state to the next (Loshchilov et al. 2024, nGPT, equations 10 and 11).

Shapes: (..., D), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.choose import Kernels
from kernels.ngpt_update.reference import reference
from kernels.spec import Sample, Size, Spec, drawn

__all__ = ["SPEC", "ngpt_update", "reference"]


def ngpt_update(h: Tensor, branch: Tensor, alpha: Tensor, kernels: Kernels) -> Tensor:
    """norm(h + alpha * (norm(branch) - h)) for h (..., D) of length 1, branch like it, step sizes alpha (D,); norm is
    `unit_norm`. In h's dtype, computed in at least fp32. Differentiable in all three."""
    run = kernels.implementation("ngpt_update", device=h.device, dtype=h.dtype, columns=h.shape[-1])
    return run(h, branch, alpha)


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, width = int(size["rows"]), int(size["width"])
    stream = torch.float32 if size.get("fp32_stream") else dtype

    def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return drawn(*shape, device=device, dtype=dtype, generator=generator, scale=scale)

    return Sample(
        {
            "h": draw(rows, width, dtype=stream, scale=width**-0.5),
            "branch": draw(rows, width, dtype=dtype),
            "alpha": draw(width, dtype=torch.float32, scale=0.3),
        }
    )


def _flops(size: Size) -> tuple[float, float]:
    elements = int(size["rows"]) * int(size["width"])
    return 9.0 * elements, 18.0 * elements


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """h and branch in, h out; these and the gradient in, two gradients out."""
    elements = int(size["rows"]) * int(size["width"])
    stream = 4 if size.get("fp32_stream") else itemsize
    return float(elements * (2 * stream + itemsize)), float(elements * (3 * stream + 2 * itemsize))


SPEC = Spec(
    sample=_sample,
    small={
        "7 x 100": {"rows": 7, "width": 100},
        "fp32 stream": {"rows": 5, "width": 48, "fp32_stream": True},
        "one row": {"rows": 1, "width": 64},
        "no rows": {"rows": 0, "width": 16},
        "three columns": {"rows": 3, "width": 3},
    },
    large={
        "65,536 x 768": {"rows": 65_536, "width": 768},
        "16,384 x 2,048, fp32 stream": {"rows": 16_384, "width": 2_048, "fp32_stream": True},
    },
    timed_on_cpu={"4,096 x 192": {"rows": 4_096, "width": 192}},
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 5e-6, "float16": 4e-3, "bfloat16": 3e-2},
)
