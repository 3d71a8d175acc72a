"""Fields set on the command line that this run does not read, because another field decides otherwise."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import ModelConfig, RunConfig
from naming import load

_MUON = ("muon_learning_rate", "muon_momentum", "muon_scale", "muon_ns_steps")
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_WIDTH = ("lr_scaling", "lr_base_width")
# A group of fields, and the values of a field with which they are read.
_READ_WITH = [
    (_MUON, "optimizer", ("muon",)),
    (_ADAM, "optimizer", ("adamw", "adam", "muon")),
    (_WIDTH, "optimizer", ("adamw", "adam")),
    (("lr_base_width",), "lr_scaling", ("width",)),
    (("cooldown_frac",), "scheduler", ("cooldown",)),
    (("min_lr_ratio", "min_lr"), "scheduler", ("cooldown", "cosine", "linear", "inverse_sqrt")),
]
# The second wins over the first where it is not null.
_WINS = [("warmup_steps", "warmup_ratio"), ("min_lr_ratio", "min_lr")]


def overruled(explicit: set[str]) -> Iterator[str]:
    """Fields to set to null: a file's value of theirs would win over what the command line says."""
    return (winner for loser, winner in _WINS if loser in explicit and winner not in explicit)


def unread(run: RunConfig, model_cfg: ModelConfig, explicit: set[str]) -> str:
    """One remark about all of them, or nothing."""
    told: dict[str, list[str]] = {}
    seen: set[str] = set()
    for fields, chooser, choices in _READ_WITH:
        chosen = getattr(run, chooser)
        names = [f for f in fields if f in explicit and f not in seen and chosen not in choices]
        if names:
            told.setdefault(f"{chooser}={chosen}", []).extend(names)
            seen.update(names)
    for loser, winner in _WINS:
        if loser in explicit - seen and getattr(run, winner) is not None:
            told.setdefault(f"{winner}={getattr(run, winner)}", []).append(loser)
    for name, why in _by_switch(run).items():
        if name in explicit:
            told.setdefault(why, []).append(name)
    for name, why in model_cfg.unread().items():
        if f"model_cfg.{name}" in explicit:
            told.setdefault(f"model_cfg.{why}", []).append(f"model_cfg.{name}")
    parts = [f"{', '.join(names)} (because of {why})" for why, names in told.items()]
    return f"not read by this run: {'; '.join(parts)}" if parts else ""


def _by_switch(run: RunConfig) -> dict[str, str]:
    """Fields of trackers that are off."""
    off = [row for row in load("trainer.run:TRACKERS").values() if not getattr(run, row.switch)]
    return {name: f"{row.switch}=false" for row in off for name in row.reads}
