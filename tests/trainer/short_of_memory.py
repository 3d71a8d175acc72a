"""Adapters that run out of memory, of a device that has none: see test_memory.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from adapters.default import DefaultModelAdapter
from tests.contract.pair import train_here
from trainer.errors import TrainingError

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"


def run_out(gradient: Tensor | None = None) -> None:
    raise torch.OutOfMemoryError(SAID)


@contextmanager
def short(where: str, limits: dict[int, int], rank: int | None = None, block: int = 0) -> Iterator[list[int]]:
    """In the body `where` ("forward", "backward" or "likelihood") fails with more rows than `limits` says, from the
    step on that it names; on process `rank` alone if there is one. "backward" fails before the gradients of `block`.
    Gives the rows of those that failed."""
    failed: list[int] = []
    forward, likelihood = DefaultModelAdapter.forward, DefaultModelAdapter.likelihood
    begin = DefaultModelAdapter.on_step_start
    at = [0]

    def too_many(rows: int) -> bool:
        here = rank is None or not dist.is_initialized() or dist.get_rank() == rank
        most = next((n for step, n in sorted(limits.items(), reverse=True) if at[0] >= step), rows)
        if here and rows > most:
            failed.append(rows)
        return here and rows > most

    def on_step_start(self: Any, ctx: Any, total_steps: int) -> None:
        at[0] = ctx.step
        begin(self, ctx, total_steps)

    def forwards(self: Any, prepared: Any) -> Any:
        if not too_many(len(prepared.tensors["inputs"])):
            return forward(self, prepared)
        if where == "forward":
            forward(self, prepared)
            run_out()
        handle = self.model.get_submodule(self.blocks()[block]).register_forward_hook(
            lambda module, given, made: (
                (made[0] if isinstance(made, tuple) else made).register_hook(run_out) and None
            )
        )
        try:
            return forward(self, prepared)
        finally:
            handle.remove()

    def scores(self: Any, batch: Any, ctx: Any) -> Any:
        found = likelihood(self, batch, ctx)
        if too_many(len(batch.rows)):
            run_out()
        return found

    changed = {"likelihood": scores} if where == "likelihood" else {"forward": forwards}
    with mock.patch.multiple(DefaultModelAdapter, on_step_start=on_step_start, **changed):
        yield failed


def train_short(architecture: str, words: list[str], run: Path, *limits: Any) -> tuple[str, dict[str, Any]]:
    """`train_here`, short of memory."""
    with short(*limits) as failed:
        said, state = train_here(architecture, words, run)
    return said, {"failed": failed, **state}


def refused(architecture: str, words: list[str], run: Path, *limits: Any) -> str:
    """What a run says that memory does not suffice for."""
    with short(*limits):
        try:
            train_here(architecture, words, run)
        except TrainingError as error:
            return str(error)
    return "it went on"
