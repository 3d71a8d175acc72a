"""Which blocks a query attends to (Yuan et al. 2025, equations 9 to 12)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["importance", "select"]


def importance(probabilities: Tensor, weights: Tensor) -> Tensor:
    """(B, T, G, M): what compressed attention says of selectable blocks (equation 9), summed over a group's heads
    (equation 10); cut off from gradients, as nothing learns through a selection.

    probabilities (B, T, G, H / G, N) of compressed blocks, 0 where one is not visible; weights (B, N, M) of `overlap`.
    """
    summed = probabilities.detach().sum(3)  # (B, T, G, N)
    return torch.einsum("btgn,bnm->btgm", summed, weights.to(summed.dtype))


def select(
    scores: Tensor,
    starts: Tensor,
    begin: Tensor,
    *,
    block: int,
    count: int,
    first: int,
    local: int,
    past: int = 0,
) -> Tensor:
    """(B, T, G, min(count, M + 1)) int32: where the selected blocks begin, ascending, -1 at the end for none.

    The first `first` blocks of the query's document and its last `local` >= 1 ones up to its own are always among them
    and count; the others are those of the highest scores, the earlier one where two are equal. scores (B, T, G, M);
    starts (B, M) of `block_starts`, whole blocks; begin (B, T) of queries, the first of them at `past`. ValueError if
    `count` has no room for those.
    """
    if local < 1 or first < 0 or count < first + local:
        raise ValueError(
            f"of {count} selected blocks the first {first} and the last {local} cannot all be: at least 1 last block "
            f"and at least {max(first, 0) + max(local, 1)} selected ones are needed"
        )
    where = torch.arange(past, past + begin.shape[1], device=begin.device)
    own = begin + (where - begin) // block * block  # where the query's own block begins
    none, own, begin, at = past + begin.shape[1], own[:, :, None], begin[:, :, None], starts[:, None, :]
    legal = (at >= begin) & (at < own)  # (B, T, M); -1 lies before every document
    forced = legal & ((at < begin + first * block) | (at > own - local * block))
    ranks = scores.masked_fill(~legal[:, :, None], -torch.inf).masked_fill(forced[:, :, None], torch.inf)
    best = ranks.sort(dim=-1, descending=True, stable=True)  # stable: of equals the earlier one
    chosen = at[:, :, None].expand_as(ranks).gather(-1, best.indices[..., : count - 1])
    chosen = chosen.masked_fill(best.values[..., : count - 1] == -torch.inf, none)
    # The own block needs no score, and may be cut short by its document's end.
    chosen = torch.cat((chosen, own[:, :, None].expand(*chosen.shape[:3], 1)), -1).sort(-1).values
    return chosen.masked_fill(chosen == none, -1).to(torch.int32)
