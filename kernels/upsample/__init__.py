"""Chunks laid over the places that they came from, as H-Net does behind its main network (Hwang et al. 2025,
arXiv:2507.07955, equations 7 to 9).

    out_t = scale_t z_{chunk of t} + residual_t

Shapes: R rows, C chunks, M places, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.choose import Kernels
from kernels.spec import Sample, Size, Spec, drawn
from kernels.upsample.reference import reference, taken

__all__ = ["SPEC", "reference", "taken", "upsample"]


def upsample(
    z: Tensor, chunk: Tensor, scale: Tensor, residual: Tensor, *, dtype: torch.dtype, kernels: Kernels
) -> Tensor:
    """(R, M, D) in `dtype`, computed in at least fp32.

    z (R, C, D); chunk (R, M) int64, the chunk of each place, from 0 to C - 1 and never falling along a row, which is
    not looked at: chunks may have no places. scale (R, M); residual (R, M, D). Differentiable in z, scale and residual,
    once. ValueError where shapes do not fit.
    """
    rows, places = chunk.shape if chunk.ndim == 2 else (-1, -1)
    fits = z.ndim == 3 and z.shape[0] == rows and (z.shape[1] or not places) and chunk.dtype == torch.int64
    if not fits or scale.shape != chunk.shape or residual.shape != (rows, places, z.shape[2]):
        raise ValueError(
            f"z (R, C, D), chunk (R, M) int64, scale (R, M) and residual (R, M, D) are needed, C >= 1 if M is, got z "
            f"{tuple(z.shape)}, chunk {tuple(chunk.shape)} {chunk.dtype}, scale {tuple(scale.shape)} and residual "
            f"{tuple(residual.shape)}"
        )
    run = kernels.implementation("upsample", device=z.device, dtype=z.dtype, columns=z.shape[2])
    return run(z, chunk, scale, residual, dtype=dtype)


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, places, chunks, width = (int(size[name]) for name in ("rows", "places", "chunks", "width"))
    within = torch.float32 if size.get("exact") else dtype  # of what comes in

    def draw(*shape: int, dtype: torch.dtype = within) -> Tensor:
        return drawn(*shape, device=device, dtype=dtype, generator=generator)

    chunk = torch.empty(rows, places, dtype=torch.int64, device=device)
    if device.type != "meta" and places:
        filled = max(1, int(chunks * float(size.get("filled", 1))))
        chunk = torch.randint(filled, (rows, places), generator=generator).sort(1)[0].to(device)
    return Sample(
        {
            "z": draw(rows, chunks, width),
            "chunk": chunk,
            "scale": draw(rows, places, dtype=torch.float32),
            "residual": draw(rows, places, width),
        },
        {"dtype": dtype},
    )


def _elements(size: Size) -> tuple[int, int]:
    """Of places, and of chunks that have some."""
    rows, width = int(size["rows"]), int(size["width"])
    filled = int(size["chunks"]) * float(size.get("filled", 1))
    return rows * int(size["places"]) * width, int(rows * filled * width)


def _flops(size: Size) -> tuple[float, float]:
    """A product and a sum; backward two of each."""
    places, _ = _elements(size)
    return 2.0 * places, 4.0 * places


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """Chunks and the residual in, the sum out; the gradient and chunks in, the gradients of chunks out."""
    places, chunks = _elements(size)
    within = 4 if size.get("exact") else itemsize
    return chunks * within + places * (within + itemsize), 2.0 * chunks * within + places * itemsize


def _size(rows: int, places: int, chunks: int, width: int, **more: float) -> Size:
    return {"rows": rows, "places": places, "chunks": chunks, "width": width, **more}


SPEC = Spec(
    sample=_sample,
    small={
        "5 x 37 of 11, width 20": _size(5, 37, 11, 20),
        "packed": _size(1, 70, 23, 33),
        "masked": _size(2, 40, 40, 8, filled=0.2),
        "padded, exact": _size(3, 29, 16, 20, filled=0.5, exact=True),
        "one chunk": _size(2, 41, 1, 3),
        "one place": _size(3, 1, 2, 1),
        "more than a tile": _size(1, 9, 4, 1_100),
        "no rows": _size(0, 4, 2, 8),
        "no places": _size(2, 0, 3, 8),
    },
    large={
        "1 x 16,384 of 2,731, width 1,024": _size(1, 16_384, 2_731, 1_024, exact=True),
        "8 x 2,048 of 2,048, width 1,536": _size(8, 2_048, 2_048, 1_536, filled=0.2, exact=True),
        "1 x 16,384 of 2,731, width 512, narrow": _size(1, 16_384, 2_731, 512),
    },
    timed_on_cpu={
        "1 x 8,192 of 1,365, width 128": _size(1, 8_192, 1_365, 128, exact=True),
        "16 x 512 of 512, width 128": _size(16, 512, 512, 128, filled=0.2, exact=True),
    },
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 3e-6, "float16": 4e-3, "bfloat16": 2e-2},
)
