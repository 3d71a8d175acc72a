"""Attention within patches, and to the end of the patch before: many short rows, as the local model of MEGABYTE has
them (Yu et al. 2023, arXiv:2305.07185, sections 2.1 and 2.3.2).

    plan = plan_patches(Patches(...), dtype=..., heads=H, width=h, kernels=self.kernels)  # once per forward pass
    y = patch_attention(q, k, v, plan)  # in every layer

Shapes: B rows, K patches of P places, L = K P, H heads, h head width, r places of the patch before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from kernels import TRITON
from kernels.choose import Call, Kernels
from kernels.patch_attention.plan import Backend, Options, Patches, PatchPlan
from kernels.spec import Sample, Size, Spec, drawn
from kernels.tuned import verdict

__all__ = [
    "SPEC",
    "PatchPlan",
    "Patches",
    "choose",
    "patch_attention",
    "patch_call",
    "plan_patches",
    "refused_by_triton",
]

LIBRARY = "library"
LONG, DROPOUT = "long patches", "dropout"  # facts of calls
LONGEST = 64  # places of a patch that a tile of the kernel can hold
WIDEST = 128  # head


def plan_patches(
    patches: Patches, *, dtype: torch.dtype, heads: int, width: int, kernels: Kernels, dropout: float = 0.0
) -> PatchPlan:
    """Choose an implementation and make what it needs. `dtype` of queries, keys and values; `dropout` of the
    probabilities: pass 0 outside of training."""
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: must be from 0 to 1, got {dropout}")
    call = patch_call(patches.size, width, dropout)
    backend = kernels.implementation("patch_attention", device=patches.documents.device, dtype=dtype, **call)
    options, made = Options(dtype, dropout), cast("Backend", backend)
    return PatchPlan(patches, made, made.build(patches, options, heads, width, kernels), options)


def patch_attention(q: Tensor, k: Tensor, v: Tensor, plan: PatchPlan) -> Tensor:
    """softmax(q k^T / sqrt(h)) v over the keys that the plan's patches let be seen, (B, L, H, h), for q, k and v of
    that shape. ValueError where they are of another."""
    rows, patches = plan.patches.documents.shape
    if q.ndim != 4 or q.shape[:2] != (rows, patches * plan.patches.size) or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k and v (B, L, H, h) of {rows} x {patches} patches of {plan.patches.size} are needed, got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    return plan.backend.attend(q, k, v, plan.patches, plan.built, plan.options)


def patch_call(size: int, width: int, dropout: float = 0.0) -> dict[str, Any]:
    """What the rule of choice may know of it (`kernels.choose.Call`)."""
    facts = {LONG: size > LONGEST, DROPOUT: dropout > 0}
    return {"columns": width, "facts": tuple(name for name, holds in facts.items() if holds)}


def refused_by_triton(call: Call) -> str | None:
    """Why a call is beyond the kernel; None if it is not."""
    if DROPOUT in call.facts:
        return "it has no dropout"
    if LONG in call.facts:
        return f"patches of more than {LONGEST} places are rows long enough for the library"
    if call.columns > WIDEST:
        return f"heads of {call.columns} are too wide for its tiles, {WIDEST} fit"
    return None


def choose(call: Call, lacking: Callable[[str], str]) -> tuple[str, str]:
    """The kernel where its gain on that GPU is measured, in 16 bits: what it masks costs as much as what it keeps where
    no tensor core multiplies. Else the library's rows."""
    because = ""
    if call.device.type == "cuda":
        if not (why_not := lacking(TRITON)):
            fast, why_not = verdict("patch_attention", TRITON, call.gpu)
            if call.dtype == torch.float32:
                fast, why_not = False, "tensor cores multiply no fp32"
            if fast:
                return TRITON, why_not
        because = f"; not {TRITON}: {why_not}"
    return LIBRARY, f"every patch a row of attention{because}"


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, patches, places, heads, width = (
        int(size[name]) for name in ("rows", "patches", "size", "heads", "width")
    )
    tensors: dict[str, Tensor | None] = {
        name: drawn(rows, patches * places, heads, width, device=device, dtype=dtype, generator=generator)
        for name in ("q", "k", "v")
    }
    every = int(size.get("documents", 0)) or max(1, patches)
    documents = (torch.arange(patches, device=device) // every).expand(rows, patches)
    known = None
    if size.get("known"):
        known = (torch.arange(patches * places, device=device) % 5 != 0).expand(rows, -1)
    made = Patches(places, int(size["reach"]), documents, known)
    return Sample(tensors, {"patches": made}, patch_call(places, width))


def _pairs(size: Size) -> float:
    """Pairs of query and key that are seen, per head, at most."""
    places, reach = int(size["size"]), int(size["reach"])
    return float(int(size["rows"]) * int(size["patches"]) * places) * ((places + 1) / 2 + reach)


def _flops(size: Size) -> tuple[float, float]:
    """Two products forward; backward five, one of them the scores once more."""
    forward = 4.0 * int(size["heads"]) * int(size["width"]) * _pairs(size)
    return forward, 2.5 * forward


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """q, k, v in and the result out; backward these and its gradient in, three gradients out."""
    each = 1.0 * itemsize
    for name in ("rows", "patches", "size", "heads", "width"):
        each *= int(size[name])
    return 4 * each, 8 * each


def _size(rows: int, patches: int, size: int, reach: int, heads: int, width: int, **more: int) -> Size:
    sizes = {"rows": rows, "patches": patches, "size": size, "reach": reach, "heads": heads}
    return {**sizes, "width": width, **more}


SPEC = Spec(
    sample=_sample,
    small={
        "5 x 9 patches of 7, 3 of those before, documents": _size(5, 9, 7, 3, 2, 8, documents=4),
        "places that hold nothing": _size(2, 21, 4, 2, 2, 12, documents=5, known=1),
        "nothing of those before": _size(2, 20, 4, 0, 3, 16),
        "all of those before": _size(1, 5, 16, 16, 2, 8),
        "a patch of more than half a tile": _size(1, 3, 40, 20, 1, 16),
        "patches of one place": _size(2, 70, 1, 1, 1, 8),
        "one patch": _size(3, 1, 4, 2, 2, 8),
        "no rows": _size(0, 4, 4, 2, 2, 8),
        "no patches": _size(2, 0, 4, 2, 2, 8),
    },
    large={
        "16 x 512 patches of 16, 8 heads of 64": _size(16, 512, 16, 8, 8, 64, documents=100),
        "16 x 1,024 patches of 8, 16 heads of 64": _size(16, 1_024, 8, 4, 16, 64),
        "8 x 512 patches of 16, 8 heads of 128": _size(8, 512, 16, 8, 8, 128),
        "64 x 128 patches of 4, 4 heads of 32": _size(64, 128, 4, 2, 4, 32, documents=30),
    },
    timed_on_cpu={"16 x 64 patches of 8, 4 heads of 32": _size(16, 64, 8, 4, 4, 32)},
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 5e-6, "float16": 2e-3, "bfloat16": 2e-2},
    dots=("_forward_kernel", "_backward_kernel"),
    narrow={"8 x 512 patches of 16, 8 heads of 128": ("_backward_kernel",)},
)
