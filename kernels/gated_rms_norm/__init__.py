"""Root-mean-square normalisation behind a gate: how version 2 of mamba ends (Dao and Gu 2024, arXiv:2405.21060, figure
6).

Shapes: (..., D), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.choose import Kernels
from kernels.gated_rms_norm.reference import reference
from kernels.spec import Sample, Size, Spec, drawn

__all__ = ["SPEC", "gated_rms_norm", "reference"]


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, *, groups: int = 1, eps: float, kernels: Kernels
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight of x = y silu(z), the mean over each of `groups` equal parts of the last axis;
    y and z (..., D), weight (D,) -> (..., D) in y's dtype, computed in at least fp32. Differentiable in all three.
    ValueError where shapes do not fit."""
    if y.shape != z.shape or weight.shape != y.shape[-1:] or groups < 1 or y.shape[-1] % groups:
        raise ValueError(
            f"y and z (..., D), weight (D,) and a divisor of D as groups are needed, got {tuple(y.shape)}, "
            f"{tuple(z.shape)}, {tuple(weight.shape)} and {groups}"
        )
    run = kernels.implementation("gated_rms_norm", device=y.device, dtype=y.dtype, columns=y.shape[-1])
    result: Tensor = run(y, z, weight, groups=groups, eps=eps)
    return result


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, width = int(size["rows"]), int(size["width"])

    def draw(*shape: int, grad: bool = True) -> Tensor:
        return drawn(*shape, device=device, dtype=dtype, generator=generator, grad=grad)

    fused = draw(rows, width + 8, grad=False)  # as mamba projects: the inputs beside the gate
    tensors: dict[str, Tensor | None] = {
        "y": draw(rows, width),
        "z": fused[:, :width].requires_grad_(),
        "weight": drawn(width, device=device, dtype=torch.float32, generator=generator),
    }
    return Sample(tensors, {"groups": int(size.get("groups", 1)), "eps": 1e-5})


def _elements(size: Size) -> float:
    return float(int(size["rows"]) * int(size["width"]))


def _flops(size: Size) -> tuple[float, float]:
    """Gate, square, sum, two products; backward about twice that."""
    return 10.0 * _elements(size), 22.0 * _elements(size)


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """y and z in, the result out; these two and its gradient in, two gradients out."""
    return 3 * _elements(size) * itemsize, 5 * _elements(size) * itemsize


SPEC = Spec(
    sample=_sample,
    small={
        "7 x 100": {"rows": 7, "width": 100},
        "three groups": {"rows": 5, "width": 102, "groups": 3},
        "one row": {"rows": 1, "width": 16},
        "two columns": {"rows": 70, "width": 2},
        "no rows": {"rows": 0, "width": 16},
    },
    large={"65,536 x 1,536": {"rows": 65_536, "width": 1_536}},
    timed_on_cpu={"4,096 x 384": {"rows": 4_096, "width": 384}},
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2},
    peers={"mamba_ssm": "kernels.gated_rms_norm.peers:of_mamba_ssm"},
)
