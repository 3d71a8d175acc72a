"""Numbers for places that open a chunk: which place opens each chunk, and which chunk each place belongs to (Hwang et
al. 2025, arXiv:2507.07955, section 2.2).

Shapes: R rows, M places, C chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.choose import Kernels
from kernels.compaction.reference import reference
from kernels.spec import Sample, Size, Spec

__all__ = ["SPEC", "compaction", "reference"]


def compaction(opens: Tensor, chunks: int, *, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """opens (R, M) bool -> (R, C) int64, the places that are True in their order, 0 behind them; and (R, M) int64, how
    many were True up to each place, less one.

    chunks: C, at least as many as are True in any row, which is not looked at. ValueError where opens is anything else.
    """
    if opens.ndim != 2 or opens.dtype != torch.bool or chunks < 0:
        raise ValueError(
            f"opens (R, M) bool and chunks >= 0 are needed, got {tuple(opens.shape)} {opens.dtype} and {chunks}"
        )
    run = kernels.implementation("compaction", device=opens.device, dtype=opens.dtype)
    return run(opens, chunks)


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, places, chunks = (int(size[name]) for name in ("rows", "places", "chunks"))
    opens = torch.empty(rows, places, dtype=torch.bool, device=device)
    if device.type != "meta":
        rank = torch.rand(rows, places, generator=generator).argsort(1).argsort(1)
        opens = (rank < int(chunks * float(size.get("filled", 1)))).to(device)
    return Sample({"opens": opens}, {"chunks": chunks})


def _flops(size: Size) -> tuple[float, float]:
    """A sum for each place."""
    return float(int(size["rows"]) * int(size["places"])), 0.0


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """A byte of each place in, its chunk out, and the place of each chunk."""
    return float(int(size["rows"]) * (9 * int(size["places"]) + 8 * int(size["chunks"]))), 0.0


def _size(rows: int, places: int, chunks: int, **more: float) -> Size:
    return {"rows": rows, "places": places, "chunks": chunks, **more}


SPEC = Spec(
    sample=_sample,
    small={
        "5 x 37, 11 chunks": _size(5, 37, 11),
        "masked": _size(3, 20, 20, filled=0.3),
        "all": _size(2, 9, 9),
        "none": _size(2, 9, 3, filled=0),
        "more than a tile": _size(2, 4_500, 900),
        "one place": _size(3, 1, 1),
        "no rows": _size(0, 4, 2),
        "no places": _size(2, 0, 3, filled=0),
        "no chunks": _size(2, 4, 0),
    },
    large={
        "1 x 131,072, 21,845 chunks": _size(1, 131_072, 21_845),
        "16 x 8,192, 8,192 chunks": _size(16, 8_192, 8_192, filled=0.2),
    },
    timed_on_cpu={"16 x 512, 512 chunks": _size(16, 512, 512, filled=0.2)},
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 0.0, "float16": 0.0, "bfloat16": 0.0},
)
