"""How far a run is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, create_model

from configs.saved import CONFIG, Architecture, Text, Trained, read_record, told
from configs.validate import read_saved
from data.tokenizers import load_tokenizer
from trainer.run.checkpoint import STATE, damage

__all__ = ["Progress", "cannot_go_on_from"]


@dataclass
class Progress:
    """How far a run is. Everything else that a step needs is a function of `step`."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # scored training tokens, all processes
    bytes: int = 0
    flops: float = 0.0  # operations of the steps up to the last log line, all processes
    seconds: float = 0.0  # spent in training steps, over all lives of the run
    seconds_total: float = 0.0  # from start to end of every life, as far as it was saved
    peak_memory_bytes: int = 0  # of any of them
    anonymous_memory_bytes: int = 0  # of any of them, as far as it was looked at
    evaluated_at: int = -1
    best_bits_per_byte: float = math.inf
    best_standard_error: float = 0.0  # of that score, as an estimate
    best_step: int = -1
    evaluations_without_improvement: int = 0
    skipped_steps: int = 0  # fp16 overflows
    logged_at_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Strict JSON has no infinity: "no evaluation yet" is null."""
        out = asdict(self)
        if not math.isfinite(self.best_bits_per_byte):
            out["best_bits_per_byte"] = None
        return out

    @classmethod
    def from_json(cls, saved: dict[str, Any], flops_per_token: float) -> Progress:
        """`flops_per_token`: the plan, for a run from before operations were counted."""
        best = saved["best_bits_per_byte"]
        planned = {"flops": flops_per_token * saved["tokens"]}
        return cls(**{**planned, **saved, "best_bits_per_byte": math.inf if best is None else best})


class _Execution(BaseModel):
    model_config = ConfigDict(strict=True)

    world_size: PositiveInt
    micro_rows: PositiveInt


class _State(Trained):
    """training_state.json, as a run needs it that goes on"""

    data: Text
    execution: _Execution
    position: int
    optimizer_file: Literal["optimizer.pt"]
    progress: dict[str, Any]
    val_rows: PositiveInt = 1


# The progress in it, as `to_json` writes that. Older runs knew fewer of its entries, and all of these three.
_entries: Any = {
    field.name: (get_type_hints(Progress)[field.name], field.default) for field in fields(Progress)
}
_entries |= {"step": (int, ...), "tokens": (int, ...), "best_bits_per_byte": (float | None, ...)}
_Saved = create_model(
    "_Saved", __config__=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False), **_entries
)


def cannot_go_on_from(checkpoint: Path) -> str | None:
    """Why a run cannot go on from a checkpoint: it is damaged, or does not say what it must. None where it can."""
    try:
        if problem := damage(checkpoint):
            return problem
        state = read_record(checkpoint / STATE, _State)
        _Saved.model_validate(state["progress"])
        architecture = read_record(checkpoint / CONFIG, Architecture)
        tokenizer = load_tokenizer(checkpoint / "tokenizer.json")
        cfg, _ = read_saved(state["training_config"], architecture["model_cfg"], str(checkpoint), [])
    except ValidationError as error:
        return f"{STATE} or {CONFIG}: {'; '.join(told(error))}"
    except ValueError as error:  # of a record, or of the tokenizer
        return str(error)
    if cfg.type != architecture["type"]:
        return f"type is {architecture['type']!r} in {CONFIG}, and {cfg.type!r} in {STATE}"
    if state["data"].get("tokenizer_digest") not in (None, tokenizer.digest):
        return "tokenizer.json is another than the one that it was trained with"
    return None
