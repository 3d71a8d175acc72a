"""How far a run is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Progress"]


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
