"""Attention by torch's FlexAttention: masks as a function of two positions, whole tiles skipped where nothing is seen.

Lengths are padded to the 128 of a tile: a mask of another length than its tensors is silently wrong, and ragged ones
gave NaN. On a CPU it has no backward. It runs compiled or not at all, and nothing is compiled while a mode of dispatch
looks on (a counter of operations, say), so that such a mode sees blocks of plain operations (chunked.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kernels.attention import chunked
from kernels.attention.plan import Backend, Options, Plan
from kernels.attention.visible import Visible

__all__ = ["BACKEND", "MIN_WIDTH", "TILE", "mask_function"]

TILE = 128
MAX_SHAPES = 64  # that are compiled, each for itself; of more it would run as written
MIN_WIDTH = 16  # of a head


class Built(NamedTuple):
    """`mask` None where it is not to be compiled."""

    mask: BlockMask | None
    softcap: Callable[..., Tensor] | None
    visible: Visible


def build(visible: Visible, options: Options) -> Built:
    softcap = _softcap(options.softcap)
    if _looked_on(visible.device):
        return Built(None, softcap, visible)
    by_row = visible.doc_ids is not None or (visible.mask is not None and visible.mask.shape[0] > 1)
    # One graph for all lengths: a mask is the same from it, and outputs may not be to the last bit.
    make = _compiled(create_block_mask, dynamic=None) if visible.device.type == "cuda" else create_block_mask
    mask = make(
        mask_function(visible),
        B=visible.rows if by_row else None,
        H=None,
        Q_LEN=_padded(visible.queries),
        KV_LEN=_padded(visible.keys),
        device=visible.device,
        BLOCK_SIZE=TILE,
    )
    return Built(mask, softcap, visible)


def mask_function(visible: Visible) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`visible.allowed()` as FlexAttention asks it: (row, head, query, key) -> bool. Queries of the padding see what
    the last one sees, as a row that sees nothing would be NaN; its keys nobody sees."""
    first = visible.keys - visible.queries  # key of the first query
    causal, window, doc_ids, pattern, mask = (
        visible.causal,
        visible.window,
        visible.doc_ids,
        visible.pattern,
        visible.mask,
    )
    queries, keys = visible.queries, visible.keys

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = key < keys
        query, key = query.clamp(max=queries - 1), key.clamp(max=keys - 1)
        if causal:
            found = found & (key <= query + first)
        if window is not None:
            found = found & (query + first - key < window)
        if pattern is not None:
            found = found & pattern.sees(query, key)
        if doc_ids is not None:
            length = doc_ids.shape[1]
            found = found & (doc_ids[row, query % length] == doc_ids[row, key % length])
        if mask is not None:
            found = found & mask[row if mask.shape[0] > 1 else 0, 0, query, key]
        return found

    return sees


def _softcap(limit: float | None) -> Callable[..., Tensor] | None:
    if limit is None:
        return None
    return lambda score, row, head, query, key: limit * torch.tanh(score / limit)


def attend(q: Tensor, k: Tensor, v: Tensor, built: Built, options: Options) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    visible = built.visible
    if (queries, keys) != (visible.queries, visible.keys):
        raise ValueError(
            f"attention: the mask was made for {visible.queries} queries and {visible.keys} keys, and these are "
            f"{queries} and {keys}"
        )
    if built.mask is None or _looked_on(q.device):
        return Plan.of(chunked.BACKEND, visible, options).run(q, k, v)
    q, k, v = (F.pad(t, (0, 0, 0, -t.shape[2] % TILE)) for t in (q, k, v))
    inside = torch.compiler.is_compiling() or q.device.type != "cuda"
    run: Any = flex_attention if inside else _compiled(flex_attention)
    found = run(
        q,
        k,
        v,
        score_mod=built.softcap,
        block_mask=built.mask,
        scale=options.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return found[:, :, :queries]


def _looked_on(device: torch.device) -> bool:
    compiled = device.type == "cuda" and not torch.compiler.is_compiling()
    return compiled and _get_current_dispatch_mode() is not None


@cache
def _compiled(function: Callable[..., Any], dynamic: bool | None = False) -> Callable[..., Any]:
    """Outside of a compiled block it would write all scores down: so it is compiled whatever the stance, which is that
    of blocks (training scores and samples with theirs eager)."""
    compiled, config = torch.compile(function, dynamic=dynamic), torch._dynamo.config

    @torch.compiler.disable  # a stance is not set while a caller is being compiled, as behind a break of its graph
    def run(*args: Any, **more: Any) -> Any:
        with torch.compiler.set_stance("default"), config.patch(recompile_limit=MAX_SHAPES):
            return compiled(*args, **more)

    return run


def _padded(length: int) -> int:
    return -(-length // TILE) * TILE


BACKEND = Backend(build, attend)
