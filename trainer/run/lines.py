"""The lines of a log: what is said of the training since the last one, and of a score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.run.manifest import peak_flops
from trainer.run.progress import Progress

if TYPE_CHECKING:
    from trainer.evaluate import Score
    from trainer.meter import Meter
    from trainer.session import Session

__all__ = ["evaluation_line", "raw_evaluation_line", "training_line"]


def training_line(
    s: Session, progress: Progress, meter: Meter, grad_norm: float, rates: dict[str, float]
) -> dict[str, Any]:
    """Empties the meter over all processes, and starts the next window of time. `rates`: learning rate by role."""
    steps, window = meter.steps, max(progress.seconds - progress.logged_at_seconds, 1e-9)
    progress.logged_at_seconds = progress.seconds
    speed = steps * s.plan.rows * s.cfg.train_seq_len / window
    line: dict[str, Any] = {
        "step": progress.step,
        "total_steps": s.total_steps,
        **meter.read(s.world),
        "grad_norm": grad_norm,
        "tokens": progress.tokens,
        "bytes": progress.bytes,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": speed,
        "eta_seconds": window / max(steps, 1) * (s.total_steps - progress.step),
        **{f"lr/{role}": rate for role, rate in rates.items()},
    }
    if s.scaler.enabled:
        line |= {"loss_scale": s.scaler.scale.item(), "skipped_steps": progress.skipped_steps}
    if peak := peak_flops(s.world.device):
        per_token = s.adapter.flops(s.cfg.train_seq_len).training_per_token
        line["mfu"] = speed * per_token / (peak * s.world.size)
    return line


def evaluation_line(progress: Progress, score: Score) -> dict[str, Any]:
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 3),
        **{f"val_{k}": v for k, v in score.as_dict().items()},
    }


def raw_evaluation_line(progress: Progress, score: Score) -> dict[str, Any]:
    """The score of the weights as they are, beside that of their average."""
    fields = {f"val_raw_{k}": getattr(score, k) for k in ("bits_per_byte", "standard_error", "kind")}
    return {"step": progress.step, **fields}
