"""A GPU for each of the jobs that run side by side on one machine, of whatever sweep: whoever holds its lock file uses
it. A job waits until as many as it needs are free."""

from __future__ import annotations

import getpass
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import filelock

from configs.hardware import cuda_device_count
from trainer.errors import TrainingError

__all__ = ["own_gpus"]

VARIABLE = "CUDA_VISIBLE_DEVICES"
PAUSE = 0.5  # seconds


@contextmanager
def own_gpus(count: int) -> Iterator[list[str]]:
    """While open, the processes that are started see `count` GPUs that no other job of ours has; yields their names.
    0 changes nothing. Raises TrainingError where this machine has fewer."""
    if count == 0:
        yield []
        return
    names = _visible()
    if count > len(names):
        raise TrainingError(f"num_gpus is {count}, and this machine shows {len(names)} GPUs to a job")
    before = os.environ.get(VARIABLE)
    with ExitStack() as held:
        mine = _taken(names, count, held)
        os.environ[VARIABLE] = ",".join(mine)
        try:
            yield mine
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def _visible() -> list[str]:
    """As CUDA_VISIBLE_DEVICES calls them."""
    given = os.environ.get(VARIABLE)
    count = cuda_device_count()
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def _taken(names: list[str], count: int, held: ExitStack) -> list[str]:
    """All of a job's at once, so that no two wait for each other."""
    while True:
        with ExitStack() as tried:
            mine: list[str] = []
            for name in names:
                lock = filelock.FileLock(str(_locks() / f"{name.replace('/', '_')}.lock"))
                try:
                    tried.enter_context(lock.acquire(timeout=0))
                except filelock.Timeout:
                    continue
                mine.append(name)
                if len(mine) == count:
                    held.enter_context(tried.pop_all())
                    return mine
        time.sleep(PAUSE)


def _locks() -> Path:
    folder = Path(tempfile.gettempdir()) / f"mytrainer-gpus-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    return folder
