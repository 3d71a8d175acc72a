"""Newton-Schulz: the nearest orthogonal matrix, roughly, of every matrix in a stack (Jordan et al. 2024).

Shapes: B matrices of one shape, m rows, n columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.choose import Kernels
from kernels.newton_schulz.coefficients import COEFFICIENTS
from kernels.newton_schulz.reference import reference
from kernels.newton_schulz.work import operations
from kernels.spec import Sample, Size, Spec, drawn
from naming import not_one_of

__all__ = ["SPEC", "newton_schulz", "reference"]


def newton_schulz(
    matrices: Tensor,
    kernels: Kernels,
    *,
    coefficients: str = "classic",
    steps: int = 5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximate U V^T of every matrix U S V^T in a (B, m, n) stack. No gradients.

    The odd quintic X <- aX + (bA + cA^2)X with A = X X^T is iterated on the shorter side, after division by
    the Frobenius norm (which bounds the largest singular value by 1).

    Args:
        matrices: (B, m, n), any floating dtype, any strides.
        coefficients: a, b and c, by a name of `COEFFICIENTS`.
        steps: number of iterations.
        dtype: of the iteration; None keeps the input's.
    Returns:
        (B, m, n) in `dtype`; singular values lie near 1, not at 1.
    """
    if matrices.ndim != 3:
        raise ValueError(f"a stack of matrices (B, m, n) is needed, got shape {tuple(matrices.shape)}")
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"coefficients: {not_one_of(coefficients, COEFFICIENTS)}")
    dtype = dtype or matrices.dtype
    run = kernels.implementation(
        "newton_schulz", device=matrices.device, dtype=dtype, columns=min(matrices.shape[1:])
    )
    with torch.no_grad():
        return run(matrices, coefficients=coefficients, steps=steps, dtype=dtype)


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    shape = (int(size[name]) for name in ("matrices", "rows", "columns"))
    matrices = drawn(*shape, device=device, dtype=dtype, generator=generator, grad=False)
    options = {"coefficients": size.get("coefficients", "classic"), "steps": 5, "dtype": dtype}
    return Sample({"matrices": matrices}, options)


def _flops(size: Size) -> tuple[float, float]:
    return operations(int(size["matrices"]), int(size["rows"]), int(size["columns"]), steps=5), 0.0


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """Of each step: X in twice and out, A out and in, the polynomial out and in. A product reads it whole."""
    s, k = sorted((int(size["rows"]), int(size["columns"])))
    return 5.0 * int(size["matrices"]) * (3 * s * k + 4 * s * s) * itemsize, 0.0


def _stack(matrices: int, rows: int, columns: int, coefficients: str = "classic") -> Size:
    return {"matrices": matrices, "rows": rows, "columns": columns, "coefficients": coefficients}


SPEC = Spec(
    sample=_sample,
    small={
        "3 x 40 x 72": _stack(3, 40, 72),
        "tall": _stack(2, 100, 37),
        "three tiles": _stack(2, 130, 200, "polar_express"),
        "one row": _stack(2, 1, 9),
        "one column": _stack(3, 7, 1),
        "no matrices": _stack(0, 8, 16),
    },
    # Of a GPT-2 of 124 million parameters: attention's four, with the fused projection as three or as one, and the MLP.
    large={
        "12 x 768 x 768": _stack(12, 768, 768),
        "12 x 2,304 x 768": _stack(12, 2_304, 768),
        "12 x 768 x 3,072": _stack(12, 768, 3_072),
        "12 x 3,072 x 768": _stack(12, 3_072, 768),
    },
    timed_on_cpu={"8 x 192 x 192": _stack(8, 192, 192), "4 x 768 x 192": _stack(4, 768, 192)},
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 3e-5, "float16": 2e-2, "bfloat16": 6e-2},
    peers={"torch": "kernels.newton_schulz.peers:of_torch"},
    dots=("_symmetric_kernel",),
)
