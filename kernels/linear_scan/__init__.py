"""A recurrence of first order, whose decay all channels of a step share: exponential moving averages, as H-Net smooths
its chunks (Hwang et al. 2025, arXiv:2507.07955, equation 5).

Shapes: B rows of T steps, D channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import CHUNKED, REFERENCE, TRITON
from kernels.choose import Call, Kernels
from kernels.linear_scan.reference import reference
from kernels.spec import Sample, Size, Spec, drawn

__all__ = ["SPEC", "choose", "linear_scan", "reference"]

FEW = 8  # steps that the definition is faster for: forward and backward, 192 channels, 0.17 against 0.21 ms
FEW_STEPS = "few steps"  # a fact of calls


def linear_scan(x: Tensor, decay: Tensor, initial: Tensor | None = None, *, kernels: Kernels) -> Tensor:
    """y (B, T, D), y_t = decay_t y_{t-1} + x_t, in x's dtype, computed in at least fp32.

    x (B, T, D) of T >= 1; decay (B, T), any finite numbers: 0 where nothing of what came before is left, as at the
    start of a document; initial (B, D): y before the first step (None: 0). Differentiable in all three, once.
    ValueError where shapes do not fit.
    """
    last = (x.shape[0], x.shape[-1])
    fits = x.ndim == 3 and x.shape[1] and decay.shape == x.shape[:2]
    if not fits or (initial is not None and initial.shape != last):
        given = "" if initial is None else f" and initial {tuple(initial.shape)}"
        raise ValueError(
            f"x (B, T, D) of T >= 1, decay (B, T) and initial (B, D) are needed, got x {tuple(x.shape)}, decay "
            f"{tuple(decay.shape)}{given}"
        )
    facts = (FEW_STEPS,) if x.shape[1] <= FEW else ()
    run = kernels.implementation(
        "linear_scan", device=x.device, dtype=x.dtype, columns=x.shape[2], facts=facts
    )
    return run(x, decay, initial)


def choose(call: Call, lacking: Callable[[str], str]) -> tuple[str, str]:
    """On a GPU one pass over memory; elsewhere products of chunks, but of a few steps."""
    why_not = lacking(TRITON) if call.device.type == "cuda" else ""
    if call.device.type == "cuda" and not why_not:
        return TRITON, "one pass over memory"
    because = f"; not {TRITON}: {why_not}" if why_not else ""
    if FEW_STEPS in call.facts:
        return REFERENCE, f"the plain definition, of at most {FEW} steps{because}"
    return CHUNKED, f"products of chunks{because}"


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, steps, width = (int(size[name]) for name in ("rows", "steps", "width"))

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return drawn(*shape, device=device, dtype=dtype, generator=generator)

    decay = draw(rows, steps, dtype=torch.float32).detach().sigmoid()
    if every := int(size.get("documents", 0)):
        decay = decay * (torch.arange(steps, device=device) % every != every - 1)
    return Sample(
        {
            "x": draw(rows, steps, width),
            "decay": decay.requires_grad_(),
            "initial": draw(rows, width, dtype=torch.float32) if size.get("initial") else None,
        }
    )


def _elements(size: Size) -> int:
    return int(size["rows"]) * int(size["steps"]) * int(size["width"])


def _flops(size: Size) -> tuple[float, float]:
    """A product and a sum; backward the same in reverse, and the sums that are gradients of decays."""
    return 2.0 * _elements(size), 4.0 * _elements(size)


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """x in, y out; the gradient and y in, the gradient of x out."""
    moved = float(_elements(size) * itemsize)
    return 2 * moved, 3 * moved


def _size(rows: int, steps: int, width: int, **more: int) -> Size:
    return {"rows": rows, "steps": steps, "width": width, **more}


SPEC = Spec(
    sample=_sample,
    small={
        "2 x 37 x 20, documents, initial": _size(2, 37, 20, documents=5, initial=True),
        "plain": _size(2, 7, 3),
        "one step": _size(3, 1, 8, initial=True),
        "one channel": _size(1, 33, 1),
        "no rows": _size(0, 4, 8),
        "more than a tile": _size(1, 70, 70, documents=9),
    },
    large={
        "8 x 2,048 x 1,024": _size(8, 2_048, 1_024),
        "1 x 16,384 x 1,536, documents, initial": _size(1, 16_384, 1_536, documents=300, initial=True),
    },
    timed_on_cpu={
        "16 x 128 x 192": _size(16, 128, 192),
        "1 x 4,096 x 192, documents": _size(1, 4_096, 192, documents=100),
    },
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2},
    peers={"mamba_ssm": "kernels.linear_scan.peers:of_mamba_ssm"},
)
