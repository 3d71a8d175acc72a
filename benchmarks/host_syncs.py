"""Does a step of training wait for the GPU? `python -m benchmarks.host_syncs OUTPUT.json [overrides]`

Every architecture takes steps of the real loop, from the second on with torch refusing operations that wait. What an
adapter declares (`waits`) stands beside what was refused. Without a GPU nothing can be refused: the file says so.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.sessions import opened, without_a_base, write
from trainer.loop import Trainer
from trainer.run.record import RunRecord
from trainer.session import Session
from trainer.signals import StopSignal

STEPS = 5  # that are watched, behind one that is not


def main(output: str, *words: str) -> int:
    on_gpu = torch.cuda.is_available() and "device=cpu" not in words
    found: dict[str, Any] = {"watched": on_gpu, "steps": STEPS, "architectures": {}}
    for type_ in without_a_base():
        s = opened(type_, list(words))
        refused = _refused(s, on_gpu)
        found["architectures"][type_] = {"declared": list(s.adapter.waits), "refused": refused}
        print(f"{type_:<10}{'waits: ' + refused if refused else 'waits for nothing'}", flush=True)
        write(output, found)
    return 1 if any(a["refused"] and not a["declared"] for a in found["architectures"].values()) else 0


def _refused(s: Session, on_gpu: bool) -> str | None:
    """The first wait, with the line of ours that asked for it."""
    with tempfile.TemporaryDirectory() as scratch, RunRecord(Path(scratch), s.world) as record:
        trainer = Trainer(s, record, StopSignal())

        def step(index: int) -> None:
            batch = s.loader.load(index)
            trainer._train_step(batch, batch.denominators)

        step(0)
        try:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("error")
            for index in range(1, 1 + STEPS):
                step(index)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            frames = [
                f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename
            ]
            return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
