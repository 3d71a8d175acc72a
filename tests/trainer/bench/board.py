"""Runs that are not trained: their scores are made up, and what they leave is what a run leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trainer.bench.documents import _ROW, FILE
from trainer.commands.launch import JobFailed
from trainer.errors import TrainingError

DOCUMENTS = 5


def leave(folder: Path, score: float, *, content: str = "text", kind: str = "exact", noise: int = 0) -> None:
    """`noise`: seed of what documents differ by, whose sum is the score."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"bits_per_byte": score, "kind": kind, "documents": DOCUMENTS, "bytes": 500, "of": "text"}
    summary = {
        "score": told,
        "parameters": {"total": 1000},
        "steps": 6,
        "tokens": 600,
        "bytes": 900,
        "flops": 1e6,
        "seconds": 2.0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    data = {"content": content, "heldout_bytes": 500}
    (folder / "manifest.json").write_text(json.dumps({"type": "gpt2", "data": data}))
    table = np.zeros(DOCUMENTS, dtype=_ROW)
    table["document"][:, 0], table["bytes"], table["step"] = np.arange(DOCUMENTS), 100, 6
    drawn = np.random.default_rng(noise).normal(size=DOCUMENTS)
    table["nats"] = (score + 0.01 * (drawn - drawn.mean())) * 100 * np.log(2)
    np.save(folder / FILE, table)


class Trainer:
    """Stands in for `launch.start`: `score` of (label, factor of the rates, seed); None for a run that fails."""

    def __init__(self, score: Callable[[str, float, int], float | None]) -> None:
        self.score, self.trained, self.configs = score, [], []

    def __call__(self, cfg, model_cfg, folder, *, isolated, origin, said):
        assert isolated and said.parent == folder
        label, factor = re.fullmatch(
            r"(.+)/x([\d.]+)-(?:tune|seed-\d+)", "/".join(folder.parts[-2:])
        ).groups()
        self.trained.append("/".join(folder.parts[-2:]))
        self.configs.append(cfg)
        found = self.score(label, float(factor), cfg.seed)
        if found is None:
            raise JobFailed(1, TrainingError("step 3 is not finite"))
        kind = "bound" if label == "mdl" else "exact"
        leave(folder, found, kind=kind, noise=cfg.seed + len(label))
        return found
