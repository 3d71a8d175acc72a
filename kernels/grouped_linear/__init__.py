"""Rows that lie in groups, each group times a matrix of its own: what experts of a layer compute (Gale et al. 2022,
arXiv:2211.15841).

Shapes: M rows in E groups, K columns in, N columns out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import REFERENCE
from kernels.choose import Call, Kernels
from kernels.grouped_linear.reference import reference
from kernels.precision import compute_dtype
from kernels.spec import Sample, Size, Spec, drawn, ids

__all__ = ["SPEC", "choose", "grouped_linear", "reference", "refused_by_grouped_mm"]

BY_GROUPS, GROUPED_MM = "by_groups", "grouped_mm"


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, kernels: Kernels) -> Tensor:
    """y (M, N), y_i = W_e x_i for every row i of group e, in the dtype of matrix products here (autocast's).

    x (M, K); weight (E, N, K); ends (E,) int32: the row behind the last of each group, cumulative, so that a group may
    be empty, and the last is M: rows behind it must not occur. Differentiable in x and weight; the gradient of a matrix
    whose group is empty is 0. ValueError where shapes do not fit.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or ends.shape != weight.shape[:1]:
        raise ValueError(
            f"x (M, K), weight (E, N, K) and ends (E,) are needed, got shapes {tuple(x.shape)}, "
            f"{tuple(weight.shape)} and {tuple(ends.shape)}"
        )
    if ends.dtype != torch.int32:
        raise ValueError(f"ends must be int32, got {ends.dtype}")
    dtype = compute_dtype(x)
    run = kernels.implementation("grouped_linear", device=x.device, dtype=dtype, columns=x.shape[1])
    return run(x.to(dtype), weight.to(dtype), ends)


def choose(call: Call, lacking: Callable[[str], str]) -> tuple[str, str]:
    """All groups at once wherever that is possible without waiting.

    On a CPU, which nobody waits for, by what is fastest where groups differ from call to call (one thread, forward and
    backward, M = 8,192, K = 192, medians in ms: reference, by_groups, grouped_mm): 8 groups of N = 256 95, 104, 90 in
    fp32, 159, 53, 168 in bf16; 32 of N = 64 46, 48, 36 and 72, 33, 81.
    """
    if not lacking(BY_GROUPS) and call.dtype != torch.float32:
        return BY_GROUPS, "group by group, in few shapes"
    if why_not := lacking(GROUPED_MM):
        return REFERENCE, f"group by group; not {GROUPED_MM}: {why_not}"
    return GROUPED_MM, "all groups at once"


def refused_by_grouped_mm(call: Call) -> str | None:
    """Where torch itself walks over groups on the host: no gain, and nobody would say that it waits."""
    if call.device.type != "cuda" or call.gpu is None:
        return None
    if call.gpu.capability[0] not in (9, 10):
        return f"torch has kernels of it for sm_90 and sm_100, and this is {call.gpu.name}"
    if call.dtype not in (torch.bfloat16, None):
        return f"on a GPU torch has kernels of it in bfloat16, and this is {str(call.dtype).removeprefix('torch.')}"
    return None


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    groups, rows, inputs, outputs = (int(size[name]) for name in ("groups", "rows", "inputs", "outputs"))
    x = drawn(rows, inputs, device=device, dtype=dtype, generator=generator)
    weight = drawn(
        groups, outputs, inputs, device=device, dtype=dtype, generator=generator, scale=inputs**-0.5
    )
    busy = int(size.get("busy", groups))  # that have any rows: the last ones
    chosen = ids(busy, rows, device=device, generator=generator) + (groups - busy)
    counts = torch.zeros(groups, dtype=torch.int64, device=device)
    counts = counts.scatter_add(0, chosen, torch.ones_like(chosen))
    return Sample({"x": x, "weight": weight, "ends": counts.cumsum(0).to(torch.int32)})


def _flops(size: Size) -> tuple[float, float]:
    product = 2.0 * int(size["rows"]) * int(size["inputs"]) * int(size["outputs"])
    return product, 2 * product


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """Rows and matrices in, rows out; all of them again, and two gradients out."""
    groups, rows, inputs, outputs = (int(size[name]) for name in ("groups", "rows", "inputs", "outputs"))
    read, written = rows * inputs + groups * inputs * outputs, rows * outputs
    return float((read + written) * itemsize), float((2 * read + written) * itemsize)


def _size(groups: int, rows: int, inputs: int, outputs: int, **more: int) -> Size:
    return {"groups": groups, "rows": rows, "inputs": inputs, "outputs": outputs, **more}


SPEC = Spec(
    sample=_sample,
    small={
        "40 x 16 -> 24, one of 4 empty": _size(4, 40, 16, 24, busy=3),
        "one takes all": _size(3, 17, 8, 16, busy=1),
        "odd widths": _size(3, 29, 7, 9),
        "one column": _size(2, 5, 1, 1),
        "one group": _size(1, 6, 8, 8),
        "more groups than rows": _size(9, 4, 8, 16),
        "no rows": _size(3, 0, 8, 16),
    },
    # Of layers of the width of GPT-2: 8 experts of which a token uses 2, 32 of which it uses 7; 64 of which it uses 8.
    large={
        "8 x (65,536 x 768 -> 1,024)": _size(8, 65_536, 768, 1_024),
        "32 x (229,376 x 768 -> 256)": _size(32, 229_376, 768, 256),
        "64 x (262,144 x 1,024 -> 512)": _size(64, 262_144, 1_024, 512),
    },
    timed_on_cpu={
        "8 x (8,192 x 192 -> 256)": _size(8, 8_192, 192, 256),
        "32 x (8,192 x 192 -> 64)": _size(32, 8_192, 192, 64),
    },
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2},
    peers={"torch": "kernels.grouped_linear.peers:of_torch"},
)
