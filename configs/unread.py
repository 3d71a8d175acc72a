"""Fields set on the command line that this run does not read, because another field decides otherwise."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import CHOICES, GENERIC_FIELDS, ModelConfig, RunConfig
from naming import load

# The second wins over the first where it is not null.
_WINS = [("warmup_steps", "warmup_ratio"), ("min_lr_ratio", "min_lr")]


def overruled(explicit: set[str]) -> Iterator[str]:
    """Fields to set to null: a file's value of theirs would win over what the command line says."""
    return (winner for loser, winner in _WINS if loser in explicit and winner not in explicit)


def unread(run: RunConfig, model_cfg: ModelConfig, explicit: set[str]) -> str:
    """One remark about all of them, or nothing."""
    reasons = {**_by_value(run), **_by_choice(run), **_by_switch(run)}
    told: dict[str, list[str]] = {}
    for name in GENERIC_FIELDS:
        if name in explicit and name in reasons:
            told.setdefault(reasons[name], []).append(name)
    for name, why in model_cfg.unread().items():
        if f"model_cfg.{name}" in explicit:
            told.setdefault(f"model_cfg.{why}", []).append(f"model_cfg.{name}")
    parts = [f"{', '.join(names)} (because of {why})" for why, names in told.items()]
    return f"not read by this run: {'; '.join(parts)}" if parts else ""


def _by_choice(run: RunConfig) -> dict[str, str]:
    """Fields that a row of some table reads and no chosen row does, with the choice that is to blame."""
    chosen = {field: choice.table[getattr(run, field)] for field, choice in CHOICES.items()}
    read = {name for row in chosen.values() for name in row.reads}
    return {
        name: f"{field}={getattr(run, field)}"
        for field, choice in CHOICES.items()
        for row in choice.table.values()
        for name in row.reads
        if name not in read
    }


def _by_switch(run: RunConfig) -> dict[str, str]:
    """Fields of trackers that are off."""
    off = [row for row in load("trainer.run:TRACKERS").values() if not getattr(run, row.switch)]
    return {name: f"{row.switch}=false" for row in off for name in row.reads}


def _by_value(run: RunConfig) -> dict[str, str]:
    reasons = {}
    if load("data:SOURCES")[run.data].near_copies is None:
        reasons["near_copies"] = f"data={run.data}"
    if run.lr_scaling == "none":
        reasons["lr_base_width"] = "lr_scaling=none"
    reasons |= {
        loser: f"{winner}={getattr(run, winner)}"
        for loser, winner in _WINS
        if getattr(run, winner) is not None
    }
    return reasons
