"""Command lines and tests in processes of their own, which may be killed: forks of one that has imported everything.

Importing takes several times as long as a tiny run. The process that forks runs nothing itself, so that every fork
begins as a new interpreter would after its imports.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported when the first optimizer is made, for over a second

import mytrainer
import trainer.commands.train
import trainer.loop  # noqa: F401

_path = list(sys.path)
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


def started(words: list[str], said: Path) -> BaseProcess:
    """A process at work on one command line; what it prints is added to the file `said`."""
    return _forked(_command, words, said)


def finished(words: list[str], said: Path, seconds: float = 200) -> None:
    """Run one command line to its end, which must be good."""
    _ended(started(words, said), said, seconds)


def passed(words: list[str], folder: Path, said: Path, seconds: float = 800) -> None:
    """Run pytest in `folder`; all of its tests must pass, and there must be some. Modules are looked for where a new
    interpreter would, not where this process does by now."""
    _ended(_forked(_tests, words, folder, said), said, seconds)


def _forked(function: Callable[..., None], *args: object) -> BaseProcess:
    process = _forks.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def _ended(process: BaseProcess, said: Path, seconds: float) -> None:
    process.join(seconds)
    if process.exitcode != 0:
        process.kill()
        written = said.read_text(encoding="utf-8") if said.exists() else ""
        raise AssertionError(f"exit status {process.exitcode}:\n{written[-6000:]}")


def _command(words: list[str], said: Path) -> None:
    _begin(said)
    sys.argv = ["mytrainer.py"]
    sys.exit(mytrainer.main(words))


def _tests(words: list[str], folder: Path, said: Path) -> None:
    _begin(said)
    os.chdir(folder)
    sys.path[:] = _path
    sys.argv = ["pytest"]
    sys.exit(pytest.main(words))


def _begin(said: Path) -> None:
    with open(said, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
