"""Attention to blocks of tokens that were selected for each query, the same ones for all heads of a group (Yuan et al.
2025, "Native Sparse Attention", arXiv:2502.11089, equations 9 to 12).

Shapes: B rows, T queries, S keys, H heads in G groups of H / G, h width of keys, w of values, N blocks of L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import CPP, TRITON
from kernels.choose import Call, Kernels
from kernels.selected_attention.reference import reference
from kernels.spec import Sample, Size, Spec, drawn, ids

__all__ = ["SPEC", "choose", "reference", "selected_attention", "selected_call", "too_wide"]

BY_BLOCKS, GATHERED, MASKED = "by_blocks", "gathered", "masked"
# Facts of calls: many keys, and many more than are selected; more of them than a CPU keeps at hand.
SPARSE, LARGE = "sparse", "large"
# At least so many keys, so many for each that is selected, and so many numbers of a group's keys and values; see
# `choose`.
SPARSE_KEYS, SPARSE_RATIO, LARGE_NUMBERS = 2_048, 2, 2**19
WIDEST = 256  # keys and values that a tile of the kernels can hold


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    positions: Tensor | None = None,
    *,
    block: int,
    scale: float | None = None,
    kernels: Kernels,
) -> Tensor:
    """o (B, T, H, w) in q's dtype: of every query one softmax, in at least fp32, over all tokens of its blocks that do
    not lie behind it; 0 where it has none. Differentiable in q, k and v.

    q (B, T, H, h), k (B, S, G, h), v (B, S, G, w). starts (B, T, G, N) int32: where in the row each block begins that
    was selected for a group, -1 for none; a block is that token and the next block - 1, and blocks of one query do not
    overlap. positions (B, T) int64: where in the row queries stand (None: they are its last T tokens). Where blocks
    begin with a document, none reaches into the next one before its query does. scale of the products: 1 / sqrt(h) if
    None. ValueError where shapes do not fit.
    """
    _check(q, k, v, starts, positions, block)
    rows, queries, _, width = q.shape
    keys, wide = k.shape[1], v.shape[3]
    if positions is None:
        positions = torch.arange(keys - queries, keys, device=q.device).expand(rows, queries)
    call = selected_call(keys, block * starts.shape[3], width, wide)
    run = kernels.implementation("selected_attention", device=q.device, dtype=q.dtype, **call)
    return run(q, k, v, starts, positions, block=block, scale=width**-0.5 if scale is None else scale)


def selected_call(keys: int, selected: int, width: int, wide: int) -> dict[str, Any]:
    """What the rule of choice may know of a call (`kernels.choose.Call`): S keys, h and w wide, of which a query
    selects at most so many."""
    sparse = keys >= max(SPARSE_KEYS, SPARSE_RATIO * selected)
    large = keys * (width + wide) >= LARGE_NUMBERS
    facts = tuple(name for name, holds in ((SPARSE, sparse), (LARGE, large)) if holds)
    return {"columns": max(width, wide), "facts": facts}


def choose(call: Call, lacking: Callable[[str], str]) -> tuple[str, str]:
    """By kernels; on a CPU, where these have more keys than stay at hand, block after block, if many are not selected.
    Without a compiler blocks again, or products with all keys where these are fewer and larger.

    One thread, forward and backward, bf16, ms, masked : by_blocks : cpp: 16 rows of 256 keys, blocks of 16, 6 heads
    39 : 229 : 10; 4 of 1,024, 16 heads 480 : 257 : 96; one of 2,048, half of it selected 442 : 223 : 152; of 4,096, a
    quarter, 2,036 : 524 : 526, and with 4 heads of 32 in place of 16 of 64 509 : 156 : 24. In fp32 47 : 130 : 12,
    762 : 228 : 93, 704 : 224 : 132, 2,817 : 521 : 688 and 616 : 62 : 18. Fetched keys took 3,640 where blocks took 653,
    and are for devices that have to be told numbers before they can be read."""
    on_cpu = call.device.type == "cpu"
    kernel, how = (
        (CPP, "a query's keys are few, and stay in the first cache")
        if on_cpu
        else (TRITON, "blocks of adjacent queries, united in tiles of tensor cores")
    )
    if on_cpu and {SPARSE, LARGE} <= {*call.facts}:
        return BY_BLOCKS, "each block with all queries that selected it"
    if not (why_not := lacking(kernel)):
        return kernel, how
    because = f"; not {kernel}: {why_not}"
    if SPARSE not in call.facts:
        return MASKED, f"products with all keys, as these are few or most of them selected{because}"
    if on_cpu:
        return BY_BLOCKS, f"each block with all queries that selected it{because}"
    return GATHERED, f"the selected keys of each query, fetched{because}"


def too_wide(call: Call) -> str | None:
    """Why a call is beyond the Triton kernels; None if it is not."""
    if call.columns <= WIDEST:
        return None
    return f"keys or values of {call.columns:,} numbers are too wide for its tiles, {WIDEST} fit"


def _check(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, positions: Tensor | None, block: int) -> None:
    fits = q.ndim == k.ndim == v.ndim == starts.ndim == 4 and (
        k.shape[:3] == v.shape[:3]
        and q.shape[3] == k.shape[3]
        and starts.shape[:3] == (*q.shape[:2], k.shape[2])
        and len(q) == len(k)
        and q.shape[1] <= k.shape[1]
        and (positions is None or positions.shape == q.shape[:2])
    )
    if not fits or q.shape[2] % k.shape[2]:
        raise ValueError(
            "q (B, T, H, h), k (B, S, G, h), v (B, S, G, w), starts (B, T, G, N) and positions (B, T) with T <= S and "
            f"G a divisor of H are needed, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, "
            f"{tuple(starts.shape)}, {None if positions is None else tuple(positions.shape)}"
        )
    if starts.dtype != torch.int32 or block < 1:
        raise ValueError(f"starts must be int32 and block at least 1, got {starts.dtype} and {block}")


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    """Every query has its own block, the first one of its document and others before it, as far as there are any. If
    scattered, blocks begin anywhere, its own one so that the query is its last token or the first."""
    batch, queries, heads, groups = (int(size[name]) for name in ("rows", "queries", "heads", "groups"))
    keys, width, wide = (
        int(size.get("keys", queries)),
        int(size["width"]),
        int(size.get("wide", size["width"])),
    )
    block, count, document = int(size["block"]), int(size["count"]), int(size.get("document", keys))

    def draw(*shape: int) -> Tensor:
        return drawn(*shape, device=device, dtype=dtype, generator=generator)

    where = torch.arange(keys - queries, keys, device=device)  # (T,)
    begin = where % block if size.get("scattered") else where // document * document
    own = (where - begin) // block  # of the query, counted from its document's start
    lead = (batch, queries, groups)
    others = ids(max(1, keys // block), *lead, max(count - 2, 0), device=device, generator=generator)
    chosen = torch.cat(
        (
            own[None, :, None, None].expand(*lead, 1),
            torch.zeros(*lead, 1, device=device, dtype=torch.int64),
            others,
        ),
        -1,
    )
    chosen = torch.where(chosen <= own[None, :, None, None], chosen, own[None, :, None, None])
    chosen = chosen.sort(-1).values[..., :count]
    twice = torch.cat(
        (torch.zeros_like(chosen[..., :1], dtype=torch.bool), chosen[..., 1:] == chosen[..., :-1]), -1
    )
    starts = torch.where(twice, -1, begin[None, :, None, None] + block * chosen)
    if size.get("none"):  # every third query has no block at all
        starts = torch.where((where % 3 == 0)[None, :, None, None], -1, starts)
    tensors: dict[str, Tensor | None] = {
        "q": draw(batch, queries, heads, width),
        "k": draw(batch, keys, groups, width),
        "v": draw(batch, keys, groups, wide),
        "starts": starts.to(torch.int32),
        "positions": where.expand(batch, queries),
    }
    return Sample(tensors, {"block": block, "scale": width**-0.5})


def _selected(size: Size) -> int:
    """Products of a query and a key, at most."""
    keys = int(size.get("keys", size["queries"]))
    seen = min(int(size["count"]) * int(size["block"]), keys)
    return int(size["rows"]) * int(size["queries"]) * int(size["heads"]) * seen


def _flops(size: Size) -> tuple[float, float]:
    """Scores and their sums of values; backward these again, and three products more."""
    width, wide = int(size["width"]), int(size.get("wide", size["width"]))
    pairs = float(_selected(size))
    return 2 * pairs * (width + wide), 2 * pairs * (3 * width + 2 * wide)


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """q in, o out; q, o and its gradient in, that of q out; k and v once, and their gradients."""
    width, wide = int(size["width"]), int(size.get("wide", size["width"]))
    queries = int(size["rows"]) * int(size["queries"]) * int(size["heads"])
    keys = int(size["rows"]) * int(size.get("keys", size["queries"])) * int(size["groups"])
    once = itemsize * keys * (width + wide)
    return float(itemsize * queries * (width + wide) + once), float(
        2 * itemsize * queries * (width + wide) + 2 * once
    )


def _size(
    rows: int, queries: int, heads: int, groups: int, width: int, block: int, count: int, **more: int
) -> Size:
    sizes = {"rows": rows, "queries": queries, "heads": heads, "groups": groups, "width": width}
    return {**sizes, "block": block, "count": count, **more}


SPEC = Spec(
    sample=_sample,
    small={
        "2 x 37, 4 heads in 2 groups, documents": _size(2, 37, 4, 2, 8, 4, 3, document=15),
        "one head": _size(1, 9, 1, 1, 4, 2, 2),
        "16 heads in a group, wider values": _size(1, 21, 16, 1, 8, 4, 3, wide=12),
        "queries without blocks": _size(2, 13, 2, 1, 4, 4, 2, none=1),
        "one query behind others": _size(3, 1, 4, 2, 8, 4, 3, keys=30),
        "some queries behind others": _size(1, 11, 6, 2, 8, 4, 3, keys=30),
        "70 queries of one head each, documents shorter than blocks": _size(1, 70, 2, 2, 4, 8, 3, document=3),
        "blocks that begin at every token": _size(1, 45, 2, 1, 4, 4, 3, scattered=1),
        "blocks of more than a tile": _size(1, 100, 3, 1, 4, 40, 2, document=57),
        "a block that 600 queries select": _size(1, 600, 1, 1, 4, 16, 2),
        "80 heads in a group": _size(1, 6, 80, 1, 4, 4, 2),
        "no rows": _size(0, 8, 2, 1, 4, 4, 2),
    },
    large={
        "1 x 8,192, 16 heads, 16 blocks of 64": _size(1, 8_192, 16, 1, 64, 64, 16),
        "8 x 4,096, 16 heads in 4 groups, documents": _size(8, 4_096, 16, 4, 64, 64, 16, document=1_500),
        "2 x 4,096, 8 heads in 8 groups, wide": _size(2, 4_096, 8, 8, 128, 64, 16),
        "1 x 4,096, 64 heads in 4 groups, of unlike widths": _size(
            1, 4_096, 64, 4, 192, 64, 16, wide=128
        ),  # the paper's
        "4 x 2,048, 16 heads, 16 blocks of 32": _size(4, 2_048, 16, 1, 64, 32, 16),
    },
    timed_on_cpu={
        "16 x 256, 6 heads in 2 groups, 4 blocks of 16": _size(16, 256, 6, 2, 32, 16, 4),
        "1 x 4,096, 4 heads, 8 blocks of 32": _size(1, 4_096, 4, 1, 32, 32, 8),
    },
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2},
    peers={"fla": "kernels.selected_attention.peers:of_fla"},
    dots=("_forward_kernel", "_queries_kernel", "_keys_kernel"),
    narrow={"4 x 2,048, 16 heads, 16 blocks of 32": ("_keys_kernel",)},
)
