"""Selected attention on a GPU, in tiles that fill tensor cores although every query has a list of its own.

Forward and the gradient of queries: a program has some adjacent queries with all heads of their group, 64 rows, and
walks over the union of their blocks, which they mostly share; which of the queries selected a block is a word of bits.
Gradients of keys and values: a program has the tokens of a block and walks over a segment of those who selected it
(inverted.py), in the same tiles of 64 rows; sums of segments lie side by side, and are added up in their order. Nothing
is added in an order that may change.

    P = exp2(s - lse);  dV = P^T dO;  dS = P (dO V^T - sum of dO O);  dQ = scale dS K;  dK = scale dS^T Q

Shapes: B rows, T queries, S keys, H heads in G groups of R, h width of keys, w of values, N blocks of L tokens, U tiles
of queries, M segments.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import device as devices
from kernels.selected_attention.inverted import inverted
from kernels.selected_attention.operation import operation
from kernels.tuned import launch

__all__ = ["selected_attention"]

LARGEST = 64  # rows (queries times heads) and keys of a tile; bits of a word, too
SMALLEST = 16  # what a tensor core multiplies at once
UNITED = 1_024  # numbers that a program unites at once
TOKENS = 16  # whose gradients a program adds up
SHARES_BYTES = 256 * 2**20  # of sums of segments that exist at once
LOG2_E = 1.4426950408889634


@triton.jit
def _union_kernel(
    starts,
    unions,
    members,
    counts,
    queries,
    groups,
    tiles,
    strides,
    COUNT: tl.constexpr,
    QUERIES: tl.constexpr,
    LISTED: tl.constexpr,
    TILES: tl.constexpr,
):
    """Of TILES tiles of QUERIES queries: all blocks in order, and which of the queries selected each, as bits.
    unions, members (B G, U, QUERIES COUNT); counts (B G, U)."""
    NOTHING: tl.constexpr = 2147483647
    across = tl.cdiv(tiles, TILES)
    number = tl.program_id(0) // across
    batch, group = (number // groups).to(tl.int64), (number % groups).to(tl.int64)
    row = number.to(tl.int64)
    tile = (tl.program_id(0) % across).to(tl.int64) * TILES + tl.arange(0, TILES)
    entry = tl.arange(0, QUERIES * LISTED)
    member, place = entry // LISTED, entry % LISTED
    query = tile[:, None] * QUERIES + member[None, :]
    at = starts + batch * strides[0] + group * strides[2] + query * strides[1] + place[None, :] * strides[3]
    listed = tl.load(at, mask=(query < queries) & (place < COUNT)[None, :], other=-1)
    listed = tl.where(listed < 0, NOTHING, listed)
    bit = tl.full([QUERIES * LISTED], 1, tl.int64) << member.to(tl.int64)
    out = (row * tiles + tile) * (QUERIES * COUNT)
    count = tl.zeros([TILES], tl.int32)
    smallest = tl.min(listed, 1)
    while tl.min(smallest, 0) < NOTHING:
        same = listed == smallest[:, None]
        bits = tl.sum(tl.where(same, bit[None, :], 0), 1)
        some = smallest < NOTHING
        tl.store(unions + out + count, smallest, mask=some)
        tl.store(members + out + count, bits, mask=some)
        count += some.to(tl.int32)
        listed = tl.where(same, NOTHING, listed)
        smallest = tl.min(listed, 1)
    tl.store(counts + row * tiles + tile, count, mask=tile < tiles)


@triton.jit
def _tile(t, strides, batch, token, head, column, there, columns):
    """t (B, T, H, h) at some tokens and heads, (tokens, columns), 0 where not there."""
    at = (
        t
        + batch * strides[0]
        + (token * strides[1] + head * strides[2])[:, None]
        + column[None, :] * strides[3]
    )
    return tl.load(at, mask=there[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def _finite(x):
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    positions,
    unions,
    members,
    counts,
    o,
    lse,
    queries,
    keys,
    groups,
    share,
    width,
    wide,
    scale,
    united,
    capacity,
    q_strides,
    k_strides,
    v_strides,
    positions_strides,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    RAISE: tl.constexpr,
):
    """o (B, T, H, w); lse (B, T, H), to base 2: -inf where a query has no keys."""
    SPLIT: tl.constexpr = HEADS * QUERIES // ROWS  # tiles of one union: heads of a query may take several
    PIECES: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    across = united * SPLIT
    number = tl.program_id(0) // across
    batch, group = (number // groups).to(tl.int64), (number % groups).to(tl.int64)
    tile = (tl.program_id(0) % across).to(tl.int64)
    union = number.to(tl.int64) * united + tile // SPLIT
    place = (tile % SPLIT) * ROWS + tl.arange(0, ROWS)
    member, of_group = place // HEADS, place % HEADS
    query, head = (tile // SPLIT) * QUERIES + member, group * share + of_group
    real = (query < queries) & (of_group < share)
    column, of_value, step = tl.arange(0, WIDTH), tl.arange(0, WIDE), tl.arange(0, KEYS)
    asked = _tile(q, q_strides, batch, query, head, column, real, width)
    at = positions + batch * positions_strides[0] + query * positions_strides[1]
    position = tl.load(at, mask=real, other=-1).to(tl.int32)
    if RAISE:
        asked = asked.to(tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, WIDE], tl.float32)
    for i in tl.range(0, tl.load(counts + union) * PIECES):
        listed = union * capacity + i // PIECES
        begin = (i % PIECES) * KEYS
        start = tl.load(unions + listed) + begin
        takes = ((tl.load(members + listed) >> member) & 1) == 1
        last = tl.where(takes, tl.minimum(position - start, BLOCK - 1 - begin), -1)
        there = (step < BLOCK - begin) & (step < keys - start)
        key = start.to(tl.int64) + step
        of_keys = _tile(k, k_strides, batch, key, group, column, there, width)
        values = _tile(v, v_strides, batch, key, group, of_value, there, wide)
        if RAISE:
            of_keys, values = of_keys.to(tl.float32), values.to(tl.float32)
        may = step[None, :] <= last[:, None]
        scores = scale * tl.dot(asked, tl.trans(of_keys), input_precision="ieee")
        scores = tl.where(may, scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        shares = tl.exp2(scores - _finite(now)[:, None])
        left = tl.exp2(largest - _finite(now))
        total = total * left + tl.sum(shares, 1)
        found = tl.dot(shares.to(values.dtype), values, found * left[:, None], input_precision="ieee")
        largest = now
    found = found / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (batch * queries + query) * groups * share + head
    tl.store(lse + place, largest + tl.log2(tl.where(total == 0.0, 1.0, total)), mask=real)
    tl.store(
        o + place[:, None] * wide + of_value[None, :],
        found.to(o.dtype.element_ty),
        mask=real[:, None] & (of_value < wide)[None, :],
    )


@triton.jit
def _queries_kernel(
    q,
    k,
    v,
    positions,
    unions,
    members,
    counts,
    o,
    lse,
    do,
    dq,
    delta,
    queries,
    keys,
    groups,
    share,
    width,
    wide,
    scale,
    factor,
    united,
    capacity,
    q_strides,
    k_strides,
    v_strides,
    positions_strides,
    do_strides,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    RAISE: tl.constexpr,
):
    """dq (B, T, H, h); delta (B, T, H): sums of dO O."""
    SPLIT: tl.constexpr = HEADS * QUERIES // ROWS
    PIECES: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    across = united * SPLIT
    number = tl.program_id(0) // across
    batch, group = (number // groups).to(tl.int64), (number % groups).to(tl.int64)
    tile = (tl.program_id(0) % across).to(tl.int64)
    union = number.to(tl.int64) * united + tile // SPLIT
    place = (tile % SPLIT) * ROWS + tl.arange(0, ROWS)
    member, of_group = place // HEADS, place % HEADS
    query, head = (tile // SPLIT) * QUERIES + member, group * share + of_group
    real = (query < queries) & (of_group < share)
    column, of_value, step = tl.arange(0, WIDTH), tl.arange(0, WIDE), tl.arange(0, KEYS)
    asked = _tile(q, q_strides, batch, query, head, column, real, width)
    grad = _tile(do, do_strides, batch, query, head, of_value, real, wide)
    at = positions + batch * positions_strides[0] + query * positions_strides[1]
    position = tl.load(at, mask=real, other=-1).to(tl.int32)
    place = (batch * queries + query) * groups * share + head
    out = tl.load(
        o + place[:, None] * wide + of_value[None, :],
        mask=real[:, None] & (of_value < wide)[None, :],
        other=0.0,
    )
    reached = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta + place, reached, mask=real)
    weight = _finite(tl.load(lse + place, mask=real, other=0.0))
    if RAISE:
        asked, grad = asked.to(tl.float32), grad.to(tl.float32)
    found = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.range(0, tl.load(counts + union) * PIECES):
        listed = union * capacity + i // PIECES
        begin = (i % PIECES) * KEYS
        start = tl.load(unions + listed) + begin
        takes = ((tl.load(members + listed) >> member) & 1) == 1
        last = tl.where(takes, tl.minimum(position - start, BLOCK - 1 - begin), -1)
        there = (step < BLOCK - begin) & (step < keys - start)
        key = start.to(tl.int64) + step
        of_keys = _tile(k, k_strides, batch, key, group, column, there, width)
        values = _tile(v, v_strides, batch, key, group, of_value, there, wide)
        if RAISE:
            of_keys, values = of_keys.to(tl.float32), values.to(tl.float32)
        may = step[None, :] <= last[:, None]
        scores = scale * tl.dot(asked, tl.trans(of_keys), input_precision="ieee")
        shares = tl.exp2(tl.where(may, scores, float("-inf")) - weight[:, None])
        dshares = tl.dot(grad, tl.trans(values), input_precision="ieee")
        dscores = shares * (dshares - reached[:, None])
        found = tl.dot(dscores.to(of_keys.dtype), of_keys, found, input_precision="ieee")
    tl.store(
        dq + place[:, None] * width + column[None, :],
        (factor * found).to(dq.dtype.element_ty),
        mask=real[:, None] & (column < width)[None, :],
    )


@triton.jit
def _keys_kernel(
    q,
    k,
    v,
    positions,
    lse,
    do,
    delta,
    pairs,
    starts,
    begins,
    firsts,
    lengths,
    of_keys,
    of_values,
    before,
    queries,
    keys,
    groups,
    share,
    width,
    wide,
    scale,
    factor,
    segments,
    q_strides,
    k_strides,
    v_strides,
    positions_strides,
    do_strides,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    RAISE: tl.constexpr,
):
    """of_keys (., M, L, h) and of_values (., M, L, w): what each segment adds to the gradients of its tokens, of lists
    from `before` on."""
    PIECES: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    piece = tl.program_id(0) % PIECES
    segment = tl.program_id(0) // PIECES
    number = before + segment // segments
    batch, group = (number // groups).to(tl.int64), (number % groups).to(tl.int64)
    row, segment = number.to(tl.int64), segment.to(tl.int64)
    own = tl.cast(before, tl.int64) * segments + segment
    length = tl.load(lengths + own)
    if length == 0:
        return
    column, of_value = tl.arange(0, WIDTH), tl.arange(0, WIDE)
    step = piece * KEYS + tl.arange(0, KEYS)
    begin = tl.load(begins + own)
    key = begin + step
    there = (step < BLOCK) & (key < keys)
    known = _tile(k, k_strides, batch, key, group, column, there, width)
    values = _tile(v, v_strides, batch, key, group, of_value, there, wide)
    if RAISE:
        known, values = known.to(tl.float32), values.to(tl.float32)
    listed = row * queries * COUNT + tl.load(firsts + own)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDE], tl.float32)
    for i in tl.range(0, tl.cdiv(length * HEADS, ROWS)):
        place = i * ROWS + tl.arange(0, ROWS)
        pair, of_group = place // HEADS, place % HEADS
        real = (pair < length) & (of_group < share)
        query = tl.load(pairs + listed + pair, mask=real, other=0) // COUNT - row * queries
        start = tl.load(starts + listed + pair, mask=real, other=0)
        head = group * share + of_group
        at = positions + batch * positions_strides[0] + query * positions_strides[1]
        position = tl.load(at, mask=real, other=-1).to(tl.int32)
        asked = _tile(q, q_strides, batch, query, head, column, real, width)
        grad = _tile(do, do_strides, batch, query, head, of_value, real, wide)
        of_query = (batch * queries + query) * groups * share + head
        weight = _finite(tl.load(lse + of_query, mask=real, other=0.0))
        reached = tl.load(delta + of_query, mask=real, other=0.0)
        if RAISE:
            asked, grad = asked.to(tl.float32), grad.to(tl.float32)
        first = start - begin.to(tl.int32)
        last = tl.where(real, tl.minimum(start + BLOCK - 1, position) - begin.to(tl.int32), -1)
        may = (step[:, None] >= first[None, :]) & (step[:, None] <= last[None, :])
        scores = scale * tl.dot(known, tl.trans(asked), input_precision="ieee")  # (KEYS, ROWS)
        shares = tl.exp2(tl.where(may, scores, float("-inf")) - weight[None, :])
        dv = tl.dot(shares.to(grad.dtype), grad, dv, input_precision="ieee")
        dshares = tl.dot(values, tl.trans(grad), input_precision="ieee")
        dscores = shares * (dshares - reached[None, :])
        dk = tl.dot(dscores.to(asked.dtype), asked, dk, input_precision="ieee")
    out = segment * BLOCK + step
    tl.store(
        of_keys + out[:, None] * width + column[None, :],
        factor * dk,
        mask=(step < BLOCK)[:, None] & (column < width)[None, :],
    )
    tl.store(
        of_values + out[:, None] * wide + of_value[None, :],
        dv,
        mask=(step < BLOCK)[:, None] & (of_value < wide)[None, :],
    )


@triton.jit
def _sum_kernel(
    shares,
    begins,
    low,
    high,
    out,
    before,
    keys,
    groups,
    width,
    segments,
    tiles,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out (B, S, G, width): the shares (., M, L, width) of all segments of a token, one after the other."""
    of_shares = tl.program_id(0) // tiles
    number = before + of_shares
    batch, group = (number // groups).to(tl.int64), (number % groups).to(tl.int64)
    row, of_shares = number.to(tl.int64), of_shares.to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    token, column = tile * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    inside = (token < keys)[:, None] & (column < width)[None, :]
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for segment in tl.range(tl.load(low + row * tiles + tile), tl.load(high + row * tiles + tile)):
        step = token - tl.load(begins + row * segments + segment)
        at = ((of_shares * segments + segment) * BLOCK + step)[:, None] * width + column[None, :]
        there = inside & ((step >= 0) & (step < BLOCK))[:, None]
        total += tl.load(shares + at, mask=there, other=0.0)
    at = ((batch * keys + token) * groups + group)[:, None] * width + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def _forward(
    made: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    positions: Tensor,
    block: int,
    scale: float,
) -> None:
    """Fills o, and the logarithm to base 2 of the sum of exponentials."""
    o, lse = made
    sizes = _sizes(q, k, v, block)
    unions, programs = _united(starts, sizes)
    _forward_kernel[(programs,)](
        q,
        k,
        v,
        positions,
        *unions,
        o,
        lse,
        *_numbers(q, k, v),
        scale * LOG2_E,
        unions[2].shape[1],
        unions[0].shape[2],
        q.stride(),
        k.stride(),
        v.stride(),
        positions.stride(),
        QUERIES=_queries(sizes),
        RAISE=devices.interpreting(),  # it multiplies the bits of bf16 as integers
        **sizes,
        **_launch("selected_attention.forward", q, sizes, 3),
    )


def _backward(
    made: tuple[Tensor, Tensor, Tensor],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    positions: Tensor,
    o: Tensor,
    lse: Tensor,
    block: int,
    scale: float,
) -> None:
    """Fills dq, dk, dv."""
    dq, dk, dv = made
    sizes = _sizes(q, k, v, block)
    unions, programs = _united(starts, sizes)
    delta = torch.empty_like(lse)
    strides = q.stride(), k.stride(), v.stride(), positions.stride(), do.stride()
    _queries_kernel[(programs,)](
        q,
        k,
        v,
        positions,
        *unions,
        o,
        lse,
        do,
        dq,
        delta,
        *_numbers(q, k, v),
        scale * LOG2_E,
        scale,
        unions[2].shape[1],
        unions[0].shape[2],
        *strides,
        QUERIES=_queries(sizes),
        RAISE=devices.interpreting(),
        **sizes,
        **_launch("selected_attention.queries", q, sizes, 2),
    )
    _of_keys(dk, dv, (q, k, v, positions, lse, do, delta), starts, strides, scale, sizes)


def _of_keys(
    dk: Tensor,
    dv: Tensor,
    given: tuple[Tensor, ...],
    starts: Tensor,
    strides: tuple[tuple[int, ...], ...],
    scale: float,
    sizes: dict[str, int],
) -> None:
    """Some lists at a time, so that the sums of segments do not outgrow the memory that they are worth."""
    q, k, v, *_ = given
    block = sizes["BLOCK"]
    turned = inverted(starts, k.shape[1], block)
    lists, segments = turned.begins.shape
    tiles = triton.cdiv(k.shape[1], TOKENS)
    token = torch.arange(tiles, device=q.device).expand(lists, -1) * TOKENS
    low = torch.searchsorted(turned.begins, token - block + 1)  # (B G, tiles): segments that reach a tile
    high = torch.searchsorted(turned.begins, (token + TOKENS).clamp(max=k.shape[1]))
    each = 4 * segments * block * (k.shape[3] + v.shape[3])
    some = min(lists, max(1, SHARES_BYTES // each))
    of_keys = torch.empty(some, segments, block, k.shape[3], dtype=torch.float32, device=q.device)
    of_values = torch.empty(some, segments, block, v.shape[3], dtype=torch.float32, device=q.device)
    chosen = {**sizes, **_launch("selected_attention.keys", q, sizes, 2)}
    pieces = triton.cdiv(block, sizes["KEYS"])
    for before in range(0, lists, some):
        here = min(some, lists - before)
        _keys_kernel[(here * segments * pieces,)](
            *given,
            turned.pairs,
            turned.starts,
            turned.begins,
            turned.firsts,
            turned.lengths,
            of_keys,
            of_values,
            before,
            *_numbers(q, k, v),
            scale * LOG2_E,
            scale,
            segments,
            *strides,
            COUNT=starts.shape[3],
            RAISE=devices.interpreting(),
            **chosen,
        )
        for shares, out, columns in ((of_keys, dk, sizes["WIDTH"]), (of_values, dv, sizes["WIDE"])):
            _sum_kernel[(here * tiles,)](
                shares,
                turned.begins,
                low,
                high,
                out,
                before,
                k.shape[1],
                k.shape[2],
                out.shape[3],
                segments,
                tiles,
                BLOCK=block,
                TOKENS=TOKENS,
                WIDTH=columns,
                num_warps=4,
            )


def _united(starts: Tensor, sizes: dict[str, int]) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """Blocks of each tile of queries, in which queries they are, how many; and how many programs there are to be."""
    batch, queries, groups, count = starts.shape
    each = _queries(sizes)
    tiles = triton.cdiv(queries, each)
    lists, device = batch * groups, starts.device
    unions = torch.empty(lists, tiles, each * count, dtype=torch.int32, device=device)
    members = torch.empty(lists, tiles, each * count, dtype=torch.int64, device=device)
    counts = torch.empty(lists, tiles, dtype=torch.int32, device=device)
    listed = triton.next_power_of_2(count)
    at_once = max(1, UNITED // (each * listed))
    _union_kernel[(lists * triton.cdiv(tiles, at_once),)](
        starts,
        unions,
        members,
        counts,
        queries,
        groups,
        tiles,
        starts.stride(),
        COUNT=count,
        QUERIES=each,
        LISTED=listed,
        TILES=at_once,
        num_warps=4,
    )
    return (unions, members, counts), lists * tiles * (sizes["HEADS"] * each // sizes["ROWS"])


def _sizes(q: Tensor, k: Tensor, v: Tensor, block: int) -> dict[str, int]:
    """Of tiles, and the constant ones of a call. fp32 is multiplied without tensor cores, from registers."""
    least = triton.next_power_of_2
    largest = LARGEST if q.element_size() <= 2 else LARGEST // 2
    sizes = {
        "BLOCK": block,
        "HEADS": least(q.shape[2] // k.shape[2]),
        "ROWS": largest,
        "KEYS": max(SMALLEST, min(largest, least(block))),
        "WIDTH": max(SMALLEST, least(k.shape[3])),
        "WIDE": max(SMALLEST, least(v.shape[3])),
    }
    gpu = devices.gpu_of(q.device)
    while gpu and sizes["KEYS"] > SMALLEST and _bytes(q, sizes, 2) > gpu.shared_bytes:
        sizes["KEYS"] //= 2
    return sizes


def _bytes(q: Tensor, sizes: dict[str, int], stages: int) -> int:
    """Shared memory of a tile of queries, and some of keys and values."""
    rows = sizes["ROWS"] + stages * sizes["KEYS"]
    return rows * (sizes["WIDTH"] + sizes["WIDE"]) * q.element_size()


def _queries(sizes: dict[str, int]) -> int:
    """Queries of a tile."""
    return max(1, sizes["ROWS"] // sizes["HEADS"])


def _numbers(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return q.shape[1], k.shape[1], k.shape[2], q.shape[2] // k.shape[2], k.shape[3], v.shape[3]


def _launch(kernel: str, q: Tensor, sizes: dict[str, int], stages: int) -> dict[str, Any]:
    """4 warps multiply 64 rows on Hopper, if results fit into their registers; on Blackwell these lie in a memory of
    their own. Gradients of keys have two results, and fewer rows at once where these are wide. All of it so that
    nothing spills in bf16: compiled, not timed."""
    wide = max(sizes["WIDTH"], sizes["WIDE"]) > 64
    of_keys = kernel == "selected_attention.keys"
    gpu = devices.gpu_of(q.device)
    capability = gpu.capability if gpu else (9, 0)
    by_cores = q.element_size() <= 2
    many = wide and (of_keys or capability < (10, 0) or not by_cores)
    many |= by_cores and capability < (9, 0)
    default = {"num_warps": 8 if many else 4, "num_stages": stages}
    if of_keys:
        least = triton.next_power_of_2(sizes["WIDTH"] + sizes["WIDE"])
        default["ROWS"] = max(SMALLEST, min(sizes["ROWS"], LARGEST * 128 // least))
    elif gpu:
        fitting = [n for n in range(2, stages + 1) if _bytes(q, sizes, n) <= gpu.shared_bytes]
        default["num_stages"] = max(fitting, default=1)
    key: dict[str, int | str] = {
        "block": sizes["BLOCK"],
        "heads": sizes["HEADS"],
        "width": sizes["WIDTH"],
        "wide": sizes["WIDE"],
        "dtype": str(q.dtype),
    }
    return launch(kernel, q.device, key, default, {"ROWS": (16, 32, 64)} if of_keys else None)


selected_attention = operation("selected_attention", _forward, _backward)
