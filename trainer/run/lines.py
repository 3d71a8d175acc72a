"""The lines of a log: what is said of the training since the last one, and of a score.

Beside what the trainer says itself, a line holds what the adapter reports under names of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from trainer.evaluate import Score
from trainer.run.manifest import peak_flops
from trainer.run.progress import Progress

if TYPE_CHECKING:
    from adapters.base import ModelAdapter, StepOutput
    from trainer.meter import Meter
    from trainer.session import Session

__all__ = [
    "evaluation_line",
    "is_own_name",
    "raw_evaluation_line",
    "refuse_taken_names",
    "refuse_taken_names_of_score",
    "training_line",
]

# What the trainer says itself: a metric of such a name would take its place. Beginnings end in a separator.
_TAKEN = {
    "step",
    "total_steps",
    "loss",
    "loss_scale",
    "skipped_steps",
    "bits_per_byte",
    "grad_norm",
    "tokens",
    "bytes",
    "flops",
    "seconds",
    "tokens_per_second",
    "eta_seconds",
    "mfu",
}
_TAKEN_BEGINNINGS = ("loss_", "lr/")
_TAKEN_IN_SCORES = {field.name for field in fields(Score)}
_TAKEN_BEGINNINGS_IN_SCORES = ("raw_",)


def is_own_name(key: str) -> bool:
    """Whether a key of a line is an adapter's metric: of training, or `val_<name>` of a score."""
    if key.startswith("val_"):
        name = key.removeprefix("val_")
        return name not in _TAKEN_IN_SCORES and not name.startswith(_TAKEN_BEGINNINGS_IN_SCORES)
    return key not in _TAKEN and not key.startswith(_TAKEN_BEGINNINGS)


def refuse_taken_names(adapter: ModelAdapter, output: StepOutput) -> None:
    """ValueError where a metric or a loss term of a step has a name that the log line uses itself."""
    for name in output.metrics:
        if name.startswith("val_") or not is_own_name(name):
            raise _taken(adapter, "metric", name, [*_TAKEN, *_TAKEN_BEGINNINGS, "val_"])
    for name in output.terms:
        if f"loss_{name}" in _TAKEN:
            raise _taken(adapter, "loss term", name, ["scale"])


def _taken(adapter: ModelAdapter, what: str, name: str, taken: Iterable[str]) -> ValueError:
    shown = (f"{word}..." if word.endswith(("_", "/")) else word for word in sorted(taken))
    return ValueError(
        f"{type(adapter).__name__} reports a {what} called {name!r}, a name that the log line uses itself. Give it "
        f"another; taken are {', '.join(shown)}"
    )


def training_line(
    s: Session, progress: Progress, meter: Meter, grad_norm: float, rates: dict[str, float]
) -> dict[str, Any]:
    """Empties the meter over all processes, and starts the next interval. `rates`: learning rate by role."""
    steps, elapsed = meter.steps, max(progress.seconds - progress.logged_at_seconds, 1e-9)
    progress.logged_at_seconds = progress.seconds
    read = meter.read(s.world)
    flops = read.pop("flops")
    progress.flops += flops
    before = s.loader.stages.rows_before
    rows = before(progress.step) - before(progress.step - steps)
    line: dict[str, Any] = {
        "step": progress.step,
        "total_steps": s.total_steps,
        **read,
        "grad_norm": grad_norm,
        "tokens": progress.tokens,
        "bytes": progress.bytes,
        "flops": progress.flops,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": rows * s.cfg.train_seq_len / elapsed,
        "eta_seconds": elapsed / max(rows, 1) * (before(s.total_steps) - before(progress.step)),
        **{f"lr/{role}": rate for role, rate in rates.items()},
    }
    if s.scaler.enabled:
        line |= {"loss_scale": s.scaler.scale.item(), "skipped_steps": progress.skipped_steps}
    if peak := peak_flops(s.world.device):
        line["mfu"] = flops / elapsed / (peak * s.world.size)
    return line


def refuse_taken_names_of_score(adapter: ModelAdapter, score: Score) -> None:
    """ValueError where a metric of a `Likelihood` has a name that a score uses itself."""
    for name in score.metrics:
        if not is_own_name(f"val_{name}"):
            raise _taken(adapter, "held-out metric", name, [*_TAKEN_IN_SCORES, *_TAKEN_BEGINNINGS_IN_SCORES])


def evaluation_line(progress: Progress, score: Score, flops: float) -> dict[str, Any]:
    """`flops`: operations of all steps so far."""
    values = score.as_dict()
    metrics = values.pop("metrics")
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "bytes": progress.bytes,
        "flops": flops,
        "seconds": round(progress.seconds, 3),
        **{f"val_{k}": v for k, v in (values | metrics).items()},
    }


def raw_evaluation_line(progress: Progress, score: Score) -> dict[str, Any]:
    """The score of the weights as they are, beside that of their average."""
    values = {f"val_raw_{k}": getattr(score, k) for k in ("bits_per_byte", "standard_error", "kind", "of")}
    return {"step": progress.step, **values}
