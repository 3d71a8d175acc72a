"""Command lines in processes of their own, which may be killed: forks of one that has imported everything.

Importing takes several times as long as a tiny run. The process that forks runs nothing itself, so that every fork
begins as a new interpreter would after its imports.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch._dynamo  # imported when the first optimizer is made, for over a second

import mytrainer
import trainer.commands.train
import trainer.loop  # noqa: F401

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


def started(words: list[str], said: Path) -> BaseProcess:
    """A process at work on one command line; what it prints is added to the file `said`."""
    process = _forks.Process(target=_run, args=(words, said), daemon=True)
    process.start()
    return process


def finished(words: list[str], said: Path, seconds: float = 200) -> None:
    """Run one command line to its end, which must be good."""
    process = started(words, said)
    process.join(seconds)
    if process.exitcode != 0:
        process.kill()
        raise AssertionError(f"exit status {process.exitcode}:\n{said.read_text(encoding='utf-8')}")


def _run(words: list[str], said: Path) -> None:
    with open(said, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    sys.argv = ["mytrainer.py"]
    sys.exit(mytrainer.main(words))
