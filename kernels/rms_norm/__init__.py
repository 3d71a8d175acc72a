"""Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019, equation 4), of a sum if wanted.

Shapes: (..., D), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.choose import Call, Kernels
from kernels.precision import compute_dtype
from kernels.rms_norm.reference import reference
from kernels.spec import Sample, Size, Spec, drawn

__all__ = ["SPEC", "add_rms_norm", "moved", "reference", "rms_norm", "too_wide"]

MAX_WIDTH = 8192


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, kernels: Kernels, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight for x (..., D), weight (D,) or None for ones; returned in `out_dtype` (None =
    that of the product that reads it), statistics in at least fp32. Differentiable in x and weight."""
    run = kernels.implementation("rms_norm", device=x.device, dtype=x.dtype, columns=x.shape[-1])
    _, y = run(x, None, weight, eps=eps, out_dtype=out_dtype or compute_dtype(x))
    return y


def add_rms_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    eps: float,
    kernels: Kernels,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x + branch and its `rms_norm`, for x and branch of one shape: a residual stream, read once and written once."""
    run = kernels.implementation("rms_norm", device=x.device, dtype=x.dtype, columns=x.shape[-1])
    total, y = run(x, branch, weight, eps=eps, out_dtype=out_dtype or compute_dtype(x))
    return total, y


def too_wide(call: Call) -> str | None:
    """What the Triton kernel of all norms cannot do: it keeps whole rows in registers."""
    if call.columns <= MAX_WIDTH:
        return None
    return f"rows of {call.columns:,} columns do not fit into registers; {MAX_WIDTH:,} do"


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, width = int(size["rows"]), int(size["width"])

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return drawn(*shape, device=device, dtype=dtype, generator=generator)

    tensors = {
        "x": draw(rows, width, dtype=torch.float32 if size.get("fp32_stream") else dtype),
        "branch": draw(rows, width) if size.get("branch") else None,
        "weight": draw(width) if size.get("weight", True) else None,
    }
    return Sample(tensors, {"eps": 1e-5, "out_dtype": dtype})


def _flops(size: Size) -> tuple[float, float]:
    elements = int(size["rows"]) * int(size["width"])
    return 4.0 * elements, 8.0 * elements


def moved(size: Size, itemsize: int) -> tuple[float, float]:
    """Bytes of any norm of rows: x in and y out; dy and x in, dx out. With a branch that and its gradient too, the sum
    out and its gradient in; x may be the fp32 stream of autocast."""
    elements = int(size["rows"]) * int(size["width"])
    stream = 4 if size.get("fp32_stream") else itemsize
    if not size.get("branch"):
        return float(elements * (stream + itemsize)), float(elements * (2 * stream + itemsize))
    dbranch = itemsize if stream != itemsize else 0
    return float(elements * 2 * (stream + itemsize)), float(elements * (3 * stream + itemsize + dbranch))


SPEC = Spec(
    sample=_sample,
    small={
        "7 x 100": {"rows": 7, "width": 100, "branch": True},
        "no branch": {"rows": 7, "width": 100},
        "fp32 stream": {"rows": 5, "width": 48, "branch": True, "fp32_stream": True},
        "no weight": {"rows": 5, "width": 129, "weight": False},
        "one row": {"rows": 1, "width": 64},
        "no rows": {"rows": 0, "width": 16, "branch": True},
        "two columns": {"rows": 3, "width": 2},
    },
    large={
        "65,536 x 768": {"rows": 65_536, "width": 768},
        "65,536 x 768, sum": {"rows": 65_536, "width": 768, "branch": True},
        "65,536 x 768, sum, fp32 stream": {
            "rows": 65_536,
            "width": 768,
            "branch": True,
            "fp32_stream": True,
        },
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
    tolerance={"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2},
    peers={
        "torch": "kernels.rms_norm.peers:of_torch",
        "liger": "kernels.rms_norm.peers:of_liger",
        "quack": "kernels.rms_norm.peers:of_quack",
    },
)
