"""Compaction on a GPU: a program has a tile of places. A first pass counts those of each tile that open a chunk; in the
second a program adds up the counts of the tiles before its own, and knows where its chunks go. No two write to one
address, and nothing is added by atomics.

Shapes: R rows, M places in N tiles, C chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.library import opaque
from kernels.tuned import launch

__all__ = ["compaction"]


def compaction(opens: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Arguments and results as `reference`."""
    source, chunk = _operation(opens, chunks)
    return source, chunk


@triton.jit
def _tile(opens, row, place, places, strides):
    at = opens + row * strides[0] + place * strides[1]
    return (tl.load(at, mask=place < places, other=0) != 0).to(tl.int32)


@triton.jit
def _counts_kernel(opens, counts, places, tiles, strides, PLACES: tl.constexpr):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    place = (tl.program_id(0) % tiles).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    tl.store(counts + tl.program_id(0), tl.sum(_tile(opens, row, place, places, strides), 0))


@triton.jit
def _numbers_kernel(
    opens,
    counts,
    source,
    chunk,
    places,
    chunks,
    tiles,
    strides,
    PLACES: tl.constexpr,
    TILES: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    place = tile.to(tl.int64) * PLACES + tl.arange(0, PLACES)
    earlier = tl.arange(0, TILES)
    before = tl.sum(tl.load(counts + row * tiles + earlier, mask=earlier < tile, other=0), 0)
    opened = _tile(opens, row, place, places, strides)
    number = (before + tl.cumsum(opened, 0) - 1).to(tl.int64)
    tl.store(chunk + row * places + place, number, mask=place < places)
    tl.store(source + row * chunks + number, place, mask=(opened == 1) & (number < chunks))


def _forward(opens: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    source, chunk = _like(opens, chunks)
    source.zero_()
    if not chunk.numel():
        return source, chunk
    rows, places = opens.shape
    chosen = launch(
        "compaction",
        opens.device,
        {"places": places},
        {"PLACES": 2048, "num_warps": 4},
        {"PLACES": (1024, 4096)},
    )
    tiles = triton.cdiv(places, chosen["PLACES"])
    counts = torch.empty(rows, tiles, dtype=torch.int32, device=opens.device)
    grid = (rows * tiles,)
    _counts_kernel[grid](opens, counts, places, tiles, opens.stride(), **chosen)
    _numbers_kernel[grid](
        opens,
        counts,
        source,
        chunk,
        places,
        chunks,
        tiles,
        opens.stride(),
        TILES=max(16, triton.next_power_of_2(tiles)),  # of short rows one shape
        **chosen,
    )
    return source, chunk


def _like(opens: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """What `_forward` returns, without values."""
    return (
        torch.empty(len(opens), chunks, dtype=torch.int64, device=opens.device),
        torch.empty(opens.shape, dtype=torch.int64, device=opens.device),
    )


def _flops(opens: Any, *args: Any, **kwargs: Any) -> int:
    return opens[0] * opens[1]


_operation = opaque("compaction", _forward, _like, flops=_flops)
