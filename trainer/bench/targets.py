"""What is said of a target, to a person and in the files of a run: what it asked for, what was found, what moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from configs.match import field_of
from configs.messages import ConfigError
from trainer.bench.counting import Text, size_of
from trainer.view.format import quantity

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import RunConfig

__all__ = ["TOLERANCE", "refuse_given", "remark", "target_met", "told_of_length", "told_of_size"]

TOLERANCE = 0.02


def target_met(target: float, found: float) -> bool:
    return abs(found / target - 1) <= TOLERANCE


def refuse_given(given: list[str], target: str) -> None:
    """ConfigError where the command line sets fields that a target decides."""
    if not given:
        return
    those = "it" if len(given) == 1 else "them"
    raise ConfigError(
        f"command line: {', '.join(given)}: {target} decides {those}. Leave out one of the two; what the search begins "
        f"with stands in a model file or preset"
    )


def remark(
    said: str, type_: str, target: float, found: float, start: Mapping[str, Any], moved: Mapping[str, Any]
) -> str:
    """What a person should know of what was found for a type. `said`: the target's field; `start`, `moved`: fields
    before and after."""
    changed = ", ".join(f"{name} {_short(start[name])} -> {_short(moved[name])}" for name in moved)
    far = f"; nothing nearer was found, and the run is marked: more than {TOLERANCE:.0%} away"
    told = (
        f"{type_} of {quantity(found)} ({found / target - 1:+.1%}){'' if target_met(target, found) else far}"
    )
    return f"{said}={quantity(target)}: {told}; {changed or 'nothing had to change'}"


def _short(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def told_of_size(cfg: RunConfig, adapter: ModelAdapter, text: Callable[[], Text]) -> dict[str, Any]:
    """`match` of a manifest and a summary, see `_entry`, of the model that is trained; {} where a run has no target.
    `text`: that which it reads."""
    if not cfg.match.given:
        return {}
    (name, target), start = next(iter(cfg.match.given.items())), cfg.match.start or {}
    counted = {"counted": cfg.match.counted} if name == "params" else {}
    moved = {f"model_cfg.{field}": [was, field_of(adapter.model_cfg, field)] for field, was in start.items()}
    return {"match": _entry({name: target, **counted}, target, size_of(adapter, cfg, text), moved)}


def told_of_length(cfg: RunConfig, came_to: Callable[[str], float]) -> dict[str, Any]:
    """`budget` likewise. `came_to`: what the run comes to, of a quantity."""
    if not cfg.budget.given:
        return {}
    (name, target), start = next(iter(cfg.budget.given.items())), cfg.budget.start or {}
    moved = {field: [before, getattr(cfg, field)] for field, before in start.items()}
    return {"budget": _entry({name: target}, target, came_to(name), moved)}


def _entry(target: Mapping[str, Any], value: float, found: float, moved: Mapping[str, Any]) -> dict[str, Any]:
    """`match` or `budget` of a manifest and a summary: target, found, error (a part of the target), met (whether that
    is within the tolerance) and moved, field -> [before, after]."""
    error, met = found / value - 1, target_met(value, found)
    return {"target": dict(target), "found": found, "error": error, "met": met, "moved": dict(moved)}
