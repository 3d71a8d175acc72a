"""Processes and devices: joining the group a launcher started, talking over it, leaving it cleanly.

Two groups: a gloo one on the CPU for everything the hosts agree on (denominators, stop flags, metrics), so that
no step waits for a device just to exchange three numbers; and the one gradients travel on (nccl on CUDA).
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.hardware import process_group, uses_cuda
from trainer.data_parallel import DataParallel
from trainer.errors import StopRequested, TrainingError

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import RunConfig

Result = TypeVar("Result")

__all__ = ["World", "choose_device", "join_process_group", "leave_process_group", "open_world"]


def choose_device(requested: str, local_rank: int = 0) -> torch.device:
    """`auto` = CUDA, then MPS, then CPU. Asking for a device that is not there is an error."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if requested == "auto":
        requested = "cuda" if cuda else "mps" if mps else "cpu"
    device = torch.device(requested)
    if device.type == "cuda":
        if not cuda:
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")
            hidden = "" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown!r})"
            raise ValueError(
                f"device: {requested!r} was asked for, but no CUDA device is visible{hidden}. Use device=cpu"
            )
        if device.index is None:
            device = torch.device("cuda", local_rank)
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"device: {device} does not exist; CUDA devices that are visible: {torch.cuda.device_count()}. Start "
                f"as many processes (num_gpus), or device=cuda:0 where each process sees one of its own"
            )
    if device.type == "mps" and not mps:
        raise ValueError("device: 'mps' was asked for, but this machine has no MPS device. Use device=cpu")
    return device


def join_process_group() -> None:
    """Join the group that torchrun, accelerate or our own launcher describes in the environment, if any."""
    if process_group()[1] > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=30))


def leave_process_group() -> None:
    """Wait for the others, drop what still refers to the group, destroy it. A plain destroy can abort."""
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


@dataclass
class _Failure:
    error: BaseException


class World:
    """This process among its peers; `alone`: by itself, even where it has joined some."""

    def __init__(self, device: torch.device, backend: str | None = None, alone: bool = False) -> None:
        joined = dist.is_initialized() and not alone
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1
        self.device = device
        backend = backend or ("nccl" if device.type == "cuda" else "gloo")
        if backend == "nccl" and device.type != "cuda":
            raise ValueError(
                f"ddp_backend: 'nccl' needs CUDA devices, but this run is on {device.type}. Use gloo"
            )
        self.backend = backend if self.size > 1 else None
        self._gradient_group = dist.new_group(backend=backend) if self.size > 1 else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum of host numbers over all processes, in fp64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], op: Any) -> list[float]:
        if self.size == 1 or not values:
            return list(values)
        vector = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(vector, op=op)
        return vector.tolist()

    def agree(self, flag: bool) -> bool:
        """True on every process if it is True on any."""
        return self.maximum([float(flag)])[0] > 0

    def any_on_device(self, flag: Tensor) -> Tensor:
        """Element-wise maximum of a device tensor over all processes, without waiting for it."""
        if self.size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._gradient_group)
        return flag

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process has, on all of them, by rank."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Do something on rank 0; its result, or its failure, on every process."""
        outcome: Any = None
        if self.is_main:
            try:
                outcome = work()
            except (TrainingError, ValueError, OSError, StopRequested) as error:
                if self.size == 1:
                    raise
                outcome = _Failure(error)
        outcome = self.broadcast(outcome)
        if isinstance(outcome, _Failure):
            raise outcome.error
        return outcome

    def main_first(self, work: Callable[[], Result]) -> Result:
        """The same work on every process, on rank 0 before the others; where it fails there, it fails on all."""
        found: list[Result] = []
        self.on_main(lambda: found.append(work()))
        return found[0] if found else work()

    def sum_on_device(self, values: Tensor) -> Tensor:
        """Element-wise sum of a tensor over all processes, on the device and in the group of the gradients."""
        if self.size == 1:
            return values
        summed = values.to(self.device, copy=True)
        dist.all_reduce(summed, group=self._gradient_group)
        return summed.to(values.device)

    def attach(self, adapter: ModelAdapter) -> None:
        """Give an adapter its `add_up`."""
        adapter.add_up = self.sum_on_device  # type: ignore[method-assign]

    def wrap(self, adapter: ModelAdapter) -> nn.Module:
        """DataParallel when there is more than one process, else the adapter itself."""
        return adapter if self.size == 1 else DataParallel(adapter, self._gradient_group)

    def without_sync(self, wrapped: nn.Module, skip: bool) -> Any:
        """Context in which backward leaves gradients local (`skip`), for all micro-batches but the last."""
        return wrapped.no_sync() if skip and isinstance(wrapped, DataParallel) else nullcontext()


def _local_rank(device: str) -> int:
    """Which of the machine's processes of the run this one is."""
    rank, size = process_group()
    given = os.environ.get("LOCAL_RANK", "")
    if size == 1:
        return 0  # whatever a shell still has
    if given.isdecimal():
        return int(given)
    if uses_cuda(device):
        raise ValueError(
            f"environment: LOCAL_RANK={given!r}, and process {rank} of {size} cannot know which GPU is its own. Set it "
            f"(under SLURM: LOCAL_RANK=$SLURM_LOCALID), or start the processes by torchrun"
        )
    return rank


def _everywhere(choose: Callable[[], torch.device]) -> torch.device:
    """What this process chooses; where one of them cannot, the same ValueError on all."""
    device, problem = torch.device("cpu"), ""
    try:
        device = choose()
    except ValueError as error:
        problem = str(error)
    problems: list[Any] = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    for told in filter(None, problems):
        raise ValueError(told)
    return device


@contextmanager
def open_world(cfg: RunConfig) -> Iterator[World]:
    """Join, choose the device, and leave at the end. After an error the group is not waited for: the peers
    may never arrive, and the launcher ends them. A group that was there before stays."""
    ours = not dist.is_initialized()
    join_process_group()
    device = _everywhere(lambda: choose_device(cfg.device, _local_rank(cfg.device)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    yield World(device, cfg.ddp_backend)
    if ours:
        leave_process_group()
