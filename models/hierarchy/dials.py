"""What a hierarchy that cuts chunks changes its size by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from configs.match import TILE, Dial, SizeDials, multiples

if TYPE_CHECKING:
    from models.hierarchy.config import HierarchyConfig

__all__ = ["hierarchy_dials"]

STATES = 8  # d_state is a multiple of it


def hierarchy_dials(cfg: HierarchyConfig, depth: str, hidden_step: int) -> SizeDials:
    """The widths of all stages, in proportion and with the heads that they have then; the layers of the innermost
    stage (`depth`, where that says how many); the hidden width there, in multiples of `hidden_step`; the states of
    Mamba-2."""
    layers = getattr(cfg, depth)
    fine = []
    if any(kind.isupper() for stack in cfg.kinds[-1] for kind in stack):
        outer = [stage.hidden for stage in cfg.stages[:-1]]
        inner = cfg.stages[-1].hidden
        fine.append(multiples("d_intermediate", inner, hidden_step, lambda width: [*outer, width]))
    if "m" in "".join(stack for stage in cfg.kinds for stack in stage).lower():
        fine.append(multiples("d_state", cfg.d_state, STATES))
    return SizeDials(
        _width(cfg),
        None if layers is None else Dial(layers, lambda n: {depth: n}),
        tuple(fine),
    )


def _width(cfg: HierarchyConfig) -> Dial:
    """Of the innermost stage, in heads that stay as wide as they are, and so many at a time that they fill tiles."""
    inner, heads = cfg.widths[-1], cfg.heads[-1]
    head = max(1, inner // heads)
    one = head * (TILE // math.gcd(head, TILE))
    kv_heads = getattr(cfg, "n_kv_heads", None)
    if kv_heads is not None and heads % kv_heads == 0:
        one *= heads // kv_heads
    mamba = math.lcm(TILE, cfg.headdim // math.gcd(cfg.headdim, cfg.expand))  # widths that its heads divide

    def fields(n: int) -> dict[str, Any]:
        grown = n * one / inner
        found: dict[str, Any] = {"d_model": n * one}
        if isinstance(cfg.d_model, list):
            outer = [max(1, round(width * grown / mamba)) * mamba for width in cfg.d_model[:-1]]
            found["d_model"] = [*outer, n * one]
        given = getattr(cfg, "n_heads")  # noqa: B009
        if isinstance(given, list):
            found["n_heads"] = [None if h is None else max(1, round(h * grown)) for h in given]
        else:
            found["n_heads"] = max(1, round(given * grown))
        if kv_heads is not None and heads % kv_heads == 0:
            found["n_kv_heads"] = max(1, found["n_heads"] * kv_heads // heads)
        if cfg.d_intermediate is not None:
            found["d_intermediate"] = [round(width * grown / TILE) * TILE for width in cfg.d_intermediate]
        return found

    return Dial(max(1, round(inner / one)), fields)
