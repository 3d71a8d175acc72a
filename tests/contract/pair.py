"""Two processes of one group that live as long as the tests that use them: starting them costs more than a run."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from tests.contract.tiny import config
from trainer import distributed, loop
from trainer.session import Session, open_session

SECONDS = 200  # that a piece of work may take


class Pair:
    """`ask` makes both processes call a function at once. They start at the first question; after a failure, which
    may leave one of them waiting for the other, new ones do."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def ask(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of process 0 and 1."""
        if not self._workers:
            self._start()
        for _, connection in self._workers:
            connection.send((function, args))
        answers = []
        for rank, (_, connection) in enumerate(self._workers):
            done, answer = (
                connection.recv() if connection.poll(SECONDS) else (False, f"no answer in {SECONDS} s")
            )
            if not done:
                self._stop()
                raise AssertionError(f"process {rank}: {answer}")
            answers.append(answer)
        return answers

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        for rank in range(2):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _stop(self) -> None:
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []


def _serve(rank: int, port: int, connection: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.join_process_group()
    distributed.leave_process_group = dist.barrier  # the group outlives a run
    while True:
        function, args = connection.recv()
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)


def train_here(architecture: str, words: list[str], run: Path) -> tuple[str, dict[str, np.ndarray]]:
    """A whole run in this process, of one or more: what it said, and its weights and buffers at the end."""
    sessions: list[Session] = []

    def kept(*args: Any, **kwargs: Any) -> Session:
        sessions.append(open_session(*args, **kwargs))
        return sessions[0]

    with contextlib.redirect_stdout(io.StringIO()) as said, mock.patch.object(loop, "open_session", kept):
        loop.train(*config(architecture, *words), run)
    return said.getvalue(), {
        name: value.numpy() for name, value in sessions[0].adapter.model.state_dict().items()
    }
