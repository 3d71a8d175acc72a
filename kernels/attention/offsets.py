"""Documents and windows in the words of attention of unequal lengths (FlashAttention's "varlen"), which needs no mask.

Rows are laid end to end, (B T, heads, h); document n is tokens offsets[n] to offsets[n + 1]. A window (left, right)
counts keys before and after the query's own, which is one more; -1 is no limit. Where a row has more keys than queries,
the last of both belong together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention.plan import Options
from kernels.attention.visible import Visible

__all__ = ["Built", "build", "joined", "refusal", "rows_again"]

MAX_WIDTH = 256  # of a head


class Built(NamedTuple):
    queries: Tensor  # (N + 1,) int32
    keys: Tensor  # (N + 1,) int32
    longest_queries: int  # bounds that no device has to be asked for
    longest_keys: int
    window: tuple[int, int]


def refusal(facts: tuple[str, ...], width: int) -> str | None:
    """Why offsets cannot say it, or heads of this width (0: unknown) are not computed."""
    for fact in ("mask", "block diffusion"):
        if fact in facts:
            return f"offsets of documents cannot say what a {fact} does"
    if "documents" in facts and "offsets" not in facts:
        return "it needs the offsets of documents (cu_seqlens), and was given their ids only"
    if width > MAX_WIDTH or width % 8:
        return f"it computes heads of up to {MAX_WIDTH} in steps of 8, and these have {width}"
    return None


def build(visible: Visible, options: Options) -> Built:
    unsaid = visible.mask, visible.pattern
    assert unsaid == (None, None) and (visible.doc_ids is None) == (visible.cu_seqlens is None), (
        "see `refusal`"
    )
    left = -1 if visible.window is None else visible.window - 1
    queries = visible.cu_seqlens
    return Built(
        _every_row(visible, visible.queries) if queries is None else queries,
        _every_row(visible, visible.keys) if queries is None else queries,
        visible.queries,
        visible.keys,
        (left, 0 if visible.causal else -1),
    )


def _every_row(visible: Visible, length: int) -> Tensor:
    """A document per row."""
    return torch.arange(visible.rows + 1, dtype=torch.int32, device=visible.device) * length


def joined(x: Tensor) -> Tensor:
    """(B, heads, T, h) -> (B T, heads, h): a view of what was made by splitting heads of (B, T, D)."""
    return x.transpose(1, 2).flatten(0, 1)


def rows_again(x: Tensor, rows: int) -> Tensor:
    """(B T, heads, h) -> (B, heads, T, h)."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2)
