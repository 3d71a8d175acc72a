"""Run folders as runs leave them, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCORE = {
    "bits_per_byte": 2.0,
    "kind": "exact",
    "estimator": "exact",
    "standard_error": 0.0,
    "documents": 3,
    "bytes": 900,
    "of": "text",
    "comparable": True,
}


def made_up(
    folder: Path,
    *,
    type_: str = "gpt2",
    bits: float = 2.0,
    points: int = 40,
    along: int = 3,
    score: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
    sample: str = "once upon a time",
) -> Path:
    """The parts that are given are put into what a run of `points` log lines, every tenth with a score of
    `along` documents, leaves."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, points + 1):
        spent = {
            "step": step,
            "tokens": 64 * step,
            "bytes": 200 * step,
            "flops": 6400.0 * step,
            "seconds": 0.5 * step,
        }
        value = bits + 5 / step
        lines.append({**spent, "loss": value, "bits_per_byte": value + 0.01 * (step % 2)})
        if step % 10 == 0:
            lines.append({**spent, "val_bits_per_byte": value, "val_kind": "exact", "val_documents": along})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {
        "type": type_,
        "score": {**SCORE, "bits_per_byte": bits, **(score or {})},
        "precision": "no",
        "parameters": {"total": 70, "active": 50, "by_role": {"matrix": 60, "scalar": 10}},
        "yardsticks": {"true entropy": 1.5},
        "steps": points,
        "tokens": 64 * points,
        "bytes": 200 * points,
        "flops": 6400.0 * points,
        "seconds": 0.5 * points,
        "tokens_per_second": 128.0,
        "generation_tokens_per_second": 31.0,
        "peak_memory_bytes": 10**9,
        **(summary or {}),
    }
    (folder / "summary.json").write_text(json.dumps(found))
    told = {"type": type_, "data": {"content": "a", "fingerprint": "f", "heldout_bytes": 900, **(data or {})}}
    (folder / "manifest.json").write_text(json.dumps({**told, **(manifest or {})}))
    settings = {
        "defaults": ["training", "_self_"],
        "type": type_,
        "seed": 1,
        "learning_rate": 0.01,
        **(config or {}),
    }
    (folder / "config.yaml").write_text(json.dumps(settings))  # which is YAML too
    (folder / "samples.txt").write_text(f"--- step 1 ---\nold\n\n--- step {points} ---\n{sample}\n\n")
    return folder
