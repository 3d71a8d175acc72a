"""Selected attention as others compute it, for the benchmark."""

from __future__ import annotations

from torch import Tensor

__all__ = ["of_fla"]

FEWEST = 16  # heads of a group


def of_fla(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, positions: Tensor, *, block: int, scale: float
) -> Tensor:
    """fla-core's Triton, of groups of 16 heads and more. Blocks have numbers there: they begin at multiples of `block`,
    and queries are the last of their row."""
    from fla.ops.nsa.parallel import parallel_nsa

    share = q.shape[2] // k.shape[2]
    if share < FEWEST or share & (share - 1):
        raise NotImplementedError(
            f"fla needs a power of two of at least {FEWEST} heads in a group, got {share}"
        )
    numbers = starts.long() // block  # -1 stays -1
    return parallel_nsa(
        q, k, v, block_indices=numbers, block_counts=starts.shape[3], block_size=block, scale=scale
    )
