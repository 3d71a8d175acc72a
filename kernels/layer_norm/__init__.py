"""Normalisation to mean 0 and variance 1 over the last axis (Ba et al. 2016, equation 4), of a sum if wanted.

Shapes: (..., D), D width; G groups of neighbouring rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.choose import Kernels
from kernels.layer_norm.reference import reference
from kernels.precision import compute_dtype
from kernels.rms_norm import moved
from kernels.spec import Sample, Size, Spec, drawn

__all__ = ["SPEC", "add_layer_norm", "layer_norm", "reference"]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kernels: Kernels) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias for x (..., D), biased variance, weight and bias (D,); returned in
    the dtype of the product that reads it, statistics in at least fp32. Differentiable in all tensors.

    Weight and bias may also be of one shape that broadcasts over x, all leading axes of x and then ones: (B, 1, D) for
    x (B, T, D), a gain and a shift to each row of the batch.
    """
    _, y = _implementation(x, weight, bias, kernels)(
        x, None, weight, bias, eps=eps, out_dtype=compute_dtype(x)
    )
    return y


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """x + branch and its `layer_norm`, for x and branch of one shape: a residual stream, read once, written once."""
    run = _implementation(x, weight, bias, kernels)
    total, y = run(x, branch, weight, bias, eps=eps, out_dtype=compute_dtype(x))
    return total, y


def _implementation(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> Callable[..., Any]:
    assert bias is None or bias.shape == weight.shape
    return kernels.implementation("layer_norm", device=x.device, dtype=x.dtype, columns=x.shape[-1])


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, width, groups = int(size["rows"]), int(size["width"]), int(size.get("groups", 0))

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return drawn(*shape, device=device, dtype=dtype, generator=generator)

    shape = (groups, rows // groups, width) if groups else (rows, width)
    gain = (groups, 1, width) if groups else (width,)
    tensors = {
        "x": draw(*shape, dtype=torch.float32 if size.get("fp32_stream") else dtype),
        "branch": draw(*shape) if size.get("branch") else None,
        "weight": draw(*gain),
        "bias": draw(*gain) if size.get("bias", True) else None,
    }
    return Sample(tensors, {"eps": 1e-5, "out_dtype": dtype})


def _flops(size: Size) -> tuple[float, float]:
    elements = int(size["rows"]) * int(size["width"])
    return 7.0 * elements, 11.0 * elements


SPEC = Spec(
    sample=_sample,
    small={
        "7 x 100": {"rows": 7, "width": 100, "branch": True},
        "no branch": {"rows": 7, "width": 100},
        "fp32 stream": {"rows": 5, "width": 48, "branch": True, "fp32_stream": True},
        "no bias": {"rows": 5, "width": 129, "bias": False},
        "groups": {"rows": 3 * 21, "width": 40, "groups": 3},
        "groups of one row": {"rows": 4, "width": 16, "groups": 4, "branch": True},
        "one row": {"rows": 1, "width": 64},
        "no rows": {"rows": 0, "width": 16, "branch": True},
        "five columns": {"rows": 3, "width": 5},
    },
    large={
        "65,536 x 768": {"rows": 65_536, "width": 768},
        "65,536 x 768, sum, fp32 stream": {
            "rows": 65_536,
            "width": 768,
            "branch": True,
            "fp32_stream": True,
        },
        "64 x 1,024 x 768, modulated": {"rows": 65_536, "width": 768, "groups": 64, "fp32_stream": True},
        "16,384 x 2,048": {"rows": 16_384, "width": 2_048},
        "8,192 x 8,192, sum, fp32 stream": {
            "rows": 8_192,
            "width": 8_192,
            "branch": True,
            "fp32_stream": True,
        },
    },
    timed_on_cpu={"4,096 x 192": {"rows": 4_096, "width": 192, "branch": True}},
    flops=_flops,
    bytes=moved,
    tolerance={"float32": 3e-6, "float16": 2e-3, "bfloat16": 2e-2},
    peers={"torch": "kernels.layer_norm.peers:of_torch", "liger": "kernels.layer_norm.peers:of_liger"},
)
