"""Work that does not fit into a device's memory: noticed by all processes alike, so that they can begin it again with
fewer rows at a time, or say together what would fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from trainer.errors import TrainingError, sentence

if TYPE_CHECKING:
    from trainer.distributed import World
    from trainer.session import Session

Result = TypeVar("Result")

__all__ = [
    "NoRoom",
    "agree",
    "begin_again",
    "largest_that_fits",
    "shortage",
    "with_fewer_rows",
    "work_of_all",
]


class NoRoom(torch.OutOfMemoryError):
    """Some process did not have the memory, and every process raises this at the same place. Nothing is left of what
    was begun; the message is of the first process that ran out."""


def shortage(work: Callable[[], object]) -> str:
    """Do it: "", or what torch says where a device has no memory left. All that `work` held is free again then."""
    try:
        work()
    except Exception as error:  # no other name: it would keep, with the traceback, what is on the device
        if not (said := _of_a_device(error)):
            raise
    else:
        return ""
    torch.cuda.empty_cache()
    return said


def _of_a_device(error: BaseException | None) -> str:
    """What torch.OutOfMemoryError says, if it is one or comes of one, as an error of the compiler's may; else ""."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return sentence(error).partition(". GPU ")[0]  # the rest is about the allocator
        error = error.__cause__
    return ""


def agree(world: World, told: str) -> str:
    """What the first process that failed was told; "" where none did. Every process must call it."""
    if not world.agree(bool(told)):
        return ""
    return next(filter(None, world.gather(told)))


def work_of_all(world: World, work: Callable[[], object]) -> None:
    """Do what every process does by itself; NoRoom on all where one has no memory for it."""
    if told := agree(world, shortage(work)):
        raise NoRoom(told)


def largest_that_fits(sizes: list[int], try_rows: Callable[[int], object]) -> int:
    """The largest of the sizes with which `try_rows` has enough memory; 0 where none does."""
    for rows in sorted(sizes, reverse=True):
        if not shortage(partial(try_rows, rows)):
            return rows
    return 0


def begin_again(
    s: Session, told: str, note: Callable[[str], object], try_rows: Callable[[int], object] | None = None
) -> None:
    """After NoRoom, whose message is `told`, and not while it is handled: it holds memory. Take the next smaller
    micro-batch, and `note` it. Every process must call it.

    `try_rows`: by which a size is found where the user has set this one; None = by a step's forward and backward pass.

    Raises:
        TrainingError: the size is the user's, and the message says which would fit; or there is no smaller one.
    """
    rows = s.plan.micro_rows
    if rows == 1 or not s.may_take_fewer_rows:
        fits = 0 if rows == 1 else largest_that_fits(s.smaller_sizes(), try_rows or s.try_rows)
        raise TrainingError(_message(s, told, int(-s.world.maximum([-float(fits)])[0])))
    s.take_fewer_rows()
    note(
        f"out of memory with {rows} rows at a time ({told}), begun again with {s.plan.micro_rows}: results are the "
        f"same to rounding"
    )


def with_fewer_rows(
    s: Session,
    note: Callable[[str], object],
    work: Callable[[], Result],
    try_rows: Callable[[int], object] | None = None,
) -> Result:
    """The result of `work`, which every process does and which leaves nothing behind where it raises NoRoom: again,
    with ever fewer rows at a time, until it fits. `try_rows` and errors as of `begin_again`."""
    while True:
        try:
            return work()
        except NoRoom as error:
            told = str(error)
        begin_again(s, told, note, try_rows)


def _message(s: Session, told: str, fits: int) -> str:
    cfg, rows, steps = s.cfg, s.plan.micro_rows, s.cfg.gradient_accumulation_steps
    less = [] if cfg.gradient_checkpointing else ["gradient_checkpointing=true"]
    less += [f"a train_seq_len below {cfg.train_seq_len}", "a smaller preset"]
    otherwise = f"Less memory takes {', '.join(less[:-1])}, or {less[-1]}"
    if not fits:
        single = f"with a single row of {cfg.train_seq_len} tokens"
        with_ = single if rows == 1 else f"with {rows} rows at a time, and {single}"
        return f"out of memory {with_} ({told}). {otherwise}"
    words = [f"batch_size={fits}"] if steps is None or isinstance(cfg.batch_size, int) else []
    words += [] if steps is None else [f"gradient_accumulation_steps={s.plan.rows_per_process // fits}"]
    auto = "batch_size=auto" if steps is None else "batch_size=auto gradient_accumulation_steps=null"
    return (
        f"out of memory with {rows} rows at a time ({told}). {' '.join(words)} fits, and results do not depend on it; "
        f"{auto} finds that by itself. {otherwise}"
    )
