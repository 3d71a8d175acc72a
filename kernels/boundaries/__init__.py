"""Where a row is cut into chunks: in front of places whose projections are unlike those of the place before (Hwang et
al. 2025, arXiv:2507.07955, equations 4 and 8).

    p_t = (1 - cos(q_{t-1}, k_t)) / 2, and 1 where a document begins;  b_t = [p_t > 1/2];  c_t = p_t if b_t else 1 - p_t

Shapes: R rows, M places, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.boundaries.reference import reference, sureness
from kernels.choose import Kernels
from kernels.spec import Sample, Size, Spec, drawn

__all__ = ["SPEC", "boundaries", "reference", "sureness"]


def boundaries(
    q: Tensor,
    k: Tensor,
    begins: Tensor,
    valid: Tensor | None = None,
    last: Tensor | None = None,
    *,
    kernels: Kernels,
) -> tuple[Tensor, Tensor, Tensor]:
    """p (R, M), b (R, M) bool and c (R, M) of queries and keys (R, M, D), in at least fp32.

    begins (R, M) bool: where a document begins; last (R, D): the query in front of the first place (None: a document
    begins there). valid (R, M) bool: places that may open a chunk (None: all). Directions are those of
    `torch.nn.functional.normalize`: none where all is 0. A tie opens nothing. Differentiable in q and k, once.
    ValueError where shapes do not fit.
    """
    lead, masks = q.shape[:2], (begins,) if valid is None else (begins, valid)
    fits = (
        q.ndim == 3 and k.shape == q.shape and all(t.shape == lead and t.dtype == torch.bool for t in masks)
    )
    if not fits or (last is not None and last.shape != (lead[0], q.shape[2])):
        given = ", ".join(
            f"{name} {tuple(t.shape)} {t.dtype}"
            for name, t in {"q": q, "k": k, "begins": begins, "valid": valid, "last": last}.items()
            if t is not None
        )
        raise ValueError(
            f"q and k (R, M, D), begins and valid (R, M) bool and last (R, D) are needed, got {given}"
        )
    run = kernels.implementation("boundaries", device=q.device, dtype=q.dtype, columns=q.shape[2])
    return run(q, k, begins, valid, last)


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, places, width = (int(size[name]) for name in ("rows", "places", "width"))
    within = torch.float32 if size.get("exact") else dtype

    def draw(*shape: int, grad: bool = True) -> Tensor:
        return drawn(*shape, device=device, dtype=within, generator=generator, grad=grad)

    where = torch.arange(places, device=device)
    every = int(size.get("documents", 0)) or max(1, places)
    return Sample(
        {
            "q": draw(rows, places, width),
            "k": draw(rows, places, width),
            "begins": (where % every == 0).expand(rows, places) & (not size.get("goes on") or where > 0),
            "valid": (where < places - places // 4).expand(rows, places) if size.get("padded") else None,
            "last": draw(rows, width, grad=False) if size.get("goes on") else None,
        }
    )


def _elements(size: Size) -> int:
    return int(size["rows"]) * int(size["places"]) * int(size["width"])


def _flops(size: Size) -> tuple[float, float]:
    """Three sums of products; backward two products and a sum for each of two gradients."""
    return 6.0 * _elements(size), 6.0 * _elements(size)


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """Queries and keys in; backward these once more, and their gradients out."""
    moved = float(_elements(size) * (4 if size.get("exact") else itemsize))
    return 2 * moved, 4 * moved


def _size(rows: int, places: int, width: int, **more: int | bool) -> Size:
    return {"rows": rows, "places": places, "width": width, **more}


SPEC = Spec(
    sample=_sample,
    small={
        "5 x 37, width 20, documents": _size(5, 37, 20, documents=9),
        "padded": _size(3, 41, 33, padded=True),
        "behind others": _size(2, 19, 12, documents=7, **{"goes on": True}),
        "one place behind others": _size(3, 1, 5, **{"goes on": True}),
        "one place": _size(2, 1, 3),
        "exact, more than a tile": _size(1, 21, 1_100, exact=True),
        "no rows": _size(0, 4, 8),
        "no places": _size(2, 0, 8),
    },
    large={
        "1 x 16,384, width 1,024, documents": _size(1, 16_384, 1_024, documents=2_048, exact=True),
        "8 x 2,048, width 1,536, padded": _size(8, 2_048, 1_536, padded=True, exact=True),
        "8 x 8,192, width 512, narrow": _size(8, 8_192, 512),
    },
    timed_on_cpu={"16 x 512, width 128": _size(16, 512, 128, exact=True)},
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 5e-6, "float16": 4e-3, "bfloat16": 2e-2},
)
