"""Fields set on the command line that this run does not read, because another field decides otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.hardware import world_size
from configs.schema import CHOICES, GENERIC_FIELDS, ModelConfig, RunConfig
from naming import load

# The second wins over the first where it is not null.
_WINS = [
    ("warmup_steps", "warmup_ratio"),
    ("min_lr_ratio", "min_lr"),
    ("num_iterations", "num_epochs"),
    ("val_tokens", "val_steps"),
]
_OF_RECALL = (
    *("synthetic_pairs", "synthetic_rounds", "synthetic_keys", "synthetic_values"),
    *("synthetic_min_distance", "synthetic_max_distance"),
)
# Where a field has this value, these others mean nothing.
_IDLE: list[tuple[str, Any, tuple[str, ...]]] = [
    ("lr_scaling", "none", ("lr_base_width",)),
    *(("synthetic", kind, ("synthetic_symbols", "synthetic_order")) for kind in ("grammar", "recall")),
    *(("synthetic", kind, _OF_RECALL) for kind in ("markov", "grammar")),
    ("val_loss_every", 0, ("val_bytes_interim",)),
    ("sample_tokens", 0, ("sample_prompt",)),
    ("muon_momentum_ends", None, ("muon_momentum_rise", "muon_momentum_fall")),
    ("early_stopping", False, ("early_stopping_patience", "early_stopping_threshold")),
    ("use_lora", False, ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_lr")),
    ("save_only_best", True, ("save_steps", "save_minutes")),
    ("save_checkpoint", False, ("save_steps", "save_minutes", "save_total_limit", "save_precision")),
]
# What `eval_only` leaves without effect, besides what optimizers and schedules read.
_OF_TRAINING = {
    *("num_iterations", "num_epochs", "time_budget", "val_loss_every", "val_bytes_interim", "logging_steps"),
    "batch_stages",
    *(
        "save_checkpoint",
        "save_steps",
        "save_minutes",
        "save_total_limit",
        "save_best_model",
        "save_only_best",
        "save_precision",
    ),
    *("early_stopping", "early_stopping_patience", "early_stopping_threshold"),
    *(
        "optimizer",
        "scheduler",
        "learning_rate",
        "lr_scaling",
        "lr_base_width",
        "weight_decay",
        "max_grad_norm",
        "z_loss",
    ),
    *("warmup_steps", "warmup_ratio"),
}


def overruled(explicit: set[str]) -> Iterator[str]:
    """Fields to set to null: a file's value of theirs would win over what the command line says."""
    return (winner for loser, winner in _WINS if loser in explicit and winner not in explicit)


def unread(run: RunConfig, model_cfg: ModelConfig, explicit: set[str]) -> str:
    """One remark about all of them, or nothing."""
    reasons = {**_by_value(run), **_by_place(run, explicit), **_by_choice(run), **_by_switch(run)}
    reasons |= _by_eval_only(run)
    told: dict[str, list[str]] = {}
    for name in GENERIC_FIELDS:
        if name in explicit and name in reasons:
            told.setdefault(reasons[name], []).append(name)
    if "match.counted" in explicit and run.match.params is None:
        told.setdefault("match.params=null", []).append("match.counted")
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
    """Fields that another one's value leaves without effect."""
    reasons = {
        name: _said(run, field)
        for field, value, names in _IDLE
        for name in names
        if getattr(run, field) == value
    }
    if run.use_lora:  # whose base has no rate
        reasons["base_model_lr"] = _said(run, "use_lora")
    elif run.base_model_lr is not None:
        reasons["learning_rate"] = _said(run, "base_model_lr")
    if not run.weight_decay and not run.muon_weight_decay:
        none = _said(run, "weight_decay")
        reasons |= dict.fromkeys(("cautious_weight_decay", "weight_decay_follows_rate"), none)
    if load("data:SOURCES")[run.data].near_copies is None:
        reasons["near_copies"] = f"data={run.data}"
    if world_size(run.num_gpus, run.device) == 1:
        reasons["ddp_backend"] = "one process"
    reasons |= {loser: _said(run, winner) for loser, winner in _WINS if getattr(run, winner) is not None}
    return reasons


def _by_eval_only(run: RunConfig) -> dict[str, str]:
    """Fields of training, where nothing is trained."""
    if not run.eval_only:
        return {}
    tables = (CHOICES[field].table for field in ("optimizer", "scheduler"))
    read = {name for table in tables for row in table.values() for name in row.reads}
    return dict.fromkeys(_OF_TRAINING | read, _said(run, "eval_only"))


def _by_place(run: RunConfig, explicit: set[str]) -> dict[str, str]:
    """Names of folders that another one makes unnecessary."""
    reasons = {}
    if run.output_dir and "output_dir" in explicit:
        reasons["model_name"] = _said(run, "output_dir")
    if run.input_file and Path(run.input_file).is_absolute() and not run.train_files:
        reasons["data_root"] = _said(run, "input_file")
    return reasons


def _said(run: RunConfig, field: str) -> str:
    """`field=value` as one writes it."""
    value = getattr(run, field)
    value = "null" if value is None else value
    return f"{field}={str(value).lower() if isinstance(value, bool) else value}"
