"""Runs whose text changes, or cannot be read by one process, half way: see test_unreadable.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from data.errors import DataError
from data.rows import HeldoutRows
from tests.contract.tiny import config
from trainer import loop
from trainer.batching import StepLoader
from trainer.errors import TrainingError


def train(architecture: str, words: list[str], run: Path) -> None:
    resume = [word for word in words if word.startswith("resume=")]
    cfg, model_cfg = config(architecture, *(word for word in words if word not in resume))
    loop.train(cfg.model_copy(update={"resume": "auto" if resume else "none"}), model_cfg, run)


@contextmanager
def changed(path: Path, how: str, step: int) -> Iterator[None]:
    """In the body a file is cut off, or touched, once the loader is at a step (-1: before the first)."""
    load = StepLoader.load

    def spoiling(self: StepLoader, at: int, *more: Any) -> Any:
        batch = load(self, at, *more) if at <= step else None
        if at == max(step, 0):
            if how == "cut off":
                os.truncate(path, 300)
            else:
                os.utime(path, (2e9, 2e9))
        return batch or load(self, at, *more)

    with mock.patch.object(StepLoader, "load", spoiling):
        yield


def refused(architecture: str, words: list[str], run: Path, where: str, rank: int) -> str:
    """What a run says of which process `rank` cannot read some text."""
    load, batch = StepLoader.load, HeldoutRows.batch

    def loads(self: StepLoader, step: int, *more: Any) -> Any:
        if dist.get_rank() == rank and step == {"step": 3, "first step": 0}.get(where, -1):
            raise DataError("'x.bin' cannot be read: Input/output error.")
        return load(self, step, *more)

    def scores(self: HeldoutRows, rows: Any) -> Any:
        scores.calls += 1
        if dist.get_rank() == rank and where == "score" and scores.calls > 3:
            raise DataError("'v.bin' cannot be read: Input/output error.")
        return batch(self, rows)

    scores.calls = 0
    with mock.patch.object(StepLoader, "load", loads), mock.patch.object(HeldoutRows, "batch", scores):
        try:
            train(architecture, words, run)
        except TrainingError as error:
            return str(error)
    return "it went on"
