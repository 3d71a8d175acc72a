"""What opens chunks, picked out of all places: the way into the main network of an H-Net (Hwang et al. 2025,
arXiv:2507.07955, section 2.2.1), which `kernels/upsample` is the way out of.

    z_j = x_{place that opens chunk j};  P_j = p_{the same place}

Shapes: R rows, M places, C chunks, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.choose import Kernels
from kernels.compaction.reference import reference as numbers
from kernels.downsample.reference import reference
from kernels.spec import Sample, Size, Spec, drawn

__all__ = ["SPEC", "downsample", "reference"]


def downsample(
    x: Tensor, p: Tensor, opens: Tensor, source: Tensor, chunk: Tensor, *, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """z (R, C, D) in x's dtype and P (R, C) in p's, 0 behind a row's chunks.

    x (R, M, D), p (R, M), opens (R, M) bool; source (R, C) and chunk (R, M) int64, as `kernels.compaction` makes them
    of `opens`. Differentiable in x and p, once. ValueError where shapes do not fit.
    """
    lead = tuple(opens.shape)
    fits = x.ndim == 3 and x.shape[:2] == p.shape == lead == tuple(chunk.shape) and opens.dtype == torch.bool
    places = source.ndim == 2 and len(source) == len(opens) and (lead[-1] or not source.shape[1])
    if not (fits and places and source.dtype == chunk.dtype == torch.int64):
        raise ValueError(
            "x (R, M, D), p (R, M), opens (R, M) bool, source (R, C) and chunk (R, M) int64 are needed, M >= 1 if C "
            f"is, got x {tuple(x.shape)}, p {tuple(p.shape)}, opens {lead} {opens.dtype}, source {tuple(source.shape)} "
            f"{source.dtype} and chunk {tuple(chunk.shape)} {chunk.dtype}"
        )
    run = kernels.implementation("downsample", device=x.device, dtype=x.dtype, columns=x.shape[2])
    return run(x, p, opens, source, chunk)


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, places, chunks, width = (int(size[name]) for name in ("rows", "places", "chunks", "width"))

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return drawn(*shape, device=device, dtype=dtype, generator=generator)

    opens = torch.empty(rows, places, dtype=torch.bool, device=device)
    if device.type == "meta":
        source, chunk = (torch.empty(rows, n, dtype=torch.int64, device=device) for n in (chunks, places))
    else:
        rank = torch.rand(rows, places, generator=generator).argsort(1).argsort(1)
        opens = (rank < int(chunks * float(size.get("filled", 1)))).to(device)
        source, chunk = numbers(opens, chunks)
    return Sample(
        {
            "x": draw(rows, places, width),
            "p": draw(rows, places, dtype=torch.float32),
            "opens": opens,
            "source": source,
            "chunk": chunk,
        }
    )


def _flops(size: Size) -> tuple[float, float]:
    """Nothing is computed."""
    return 0.0, 0.0


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """Chunks in and out; backward the gradients of chunks in, of all places out."""
    rows, width = int(size["rows"]), int(size["width"])
    filled = int(size["chunks"]) * float(size.get("filled", 1))
    return 2.0 * rows * filled * width * itemsize, rows * (filled + int(size["places"])) * width * itemsize


def _size(rows: int, places: int, chunks: int, width: int, **more: float) -> Size:
    return {"rows": rows, "places": places, "chunks": chunks, "width": width, **more}


SPEC = Spec(
    sample=_sample,
    small={
        "5 x 37, 16 chunks, some empty, width 20": _size(5, 37, 16, 20, filled=0.7),
        "packed": _size(1, 70, 23, 33),
        "masked": _size(2, 40, 40, 8, filled=0.2),
        "all": _size(2, 9, 9, 3),
        "one place": _size(3, 1, 1, 1),
        "more than a tile": _size(1, 9, 4, 1_100),
        "no rows": _size(0, 4, 2, 8),
        "no places": _size(2, 0, 0, 8),
        "no chunks": _size(2, 5, 0, 8),
    },
    large={
        "1 x 16,384, 2,731 chunks, width 1,024": _size(1, 16_384, 2_731, 1_024),
        "8 x 2,048, 2,048 chunks, width 1,536": _size(8, 2_048, 2_048, 1_536, filled=0.2),
    },
    timed_on_cpu={"1 x 8,192, 1,365 chunks, width 128": _size(1, 8_192, 1_365, 128)},
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 0.0, "float16": 0.0, "bfloat16": 0.0},
)
