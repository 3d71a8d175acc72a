"""Forward and backward of one optimizer step: what training, a timing and a replay have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapters.base import StepOutput, weighted_loss
from trainer.data_parallel import DataParallel
from trainer.memory import NoRoom, agree, shortage
from trainer.precision import autocast

if TYPE_CHECKING:
    from trainer.batching import StepBatch
    from trainer.session import Session

__all__ = ["accumulate_gradients", "dropout_seed"]


def dropout_seed(seed: int, step: int, first_row: int) -> int:
    """Dropout is a function of (seed, step, first global row of the micro-batch)."""
    digest = hashlib.sha256(f"dropout/{seed}/{step}/{first_row}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def accumulate_gradients(
    s: Session,
    batch: StepBatch,
    denominators: dict[str, float],
    total_steps: int,
    on_output: Callable[[StepOutput], None] = lambda output: None,
) -> Tensor:
    """Leave the step's gradients in the parameters, exchanged and unscaled.

    Args:
        denominators: of the whole step, over all processes.
        on_output: called with what `forward` returned, per micro-batch.
    Returns:
        (), bool, on the device: whether a loss was not finite.
    Raises:
        NoRoom: on every process, where one has no memory for a micro-batch. There are no gradients then.
    """
    s.adapter.on_step_start(batch.ctx, total_steps)
    bad_loss = torch.zeros((), dtype=torch.bool, device=s.world.device)
    short = shortage(lambda: _micro_batches(s, batch, denominators, on_output, bad_loss))
    if short:
        s.optimizers.zero_grad()
        if isinstance(s.wrapped, DataParallel):
            s.wrapped.give_up()
    if told := agree(s.world, short):
        s.optimizers.zero_grad()
        raise NoRoom(told)
    s.scaler.unscale([p.grad for p in s.parameters if p.grad is not None])
    return bad_loss


def _micro_batches(
    s: Session,
    batch: StepBatch,
    denominators: dict[str, float],
    on_output: Callable[[StepOutput], None],
    bad_loss: Tensor,
) -> None:
    """Forward and backward of each; whether a loss was not finite is added to `bad_loss`."""
    device = s.world.device
    for index, prepared in enumerate(batch.micro):
        torch.manual_seed(dropout_seed(s.cfg.seed, batch.step, batch.first_rows[index]))
        with s.world.without_sync(s.wrapped, skip=index + 1 < len(batch.micro)):
            with autocast(s.precision, device):
                output = s.wrapped(prepared.to(device))
            loss = weighted_loss(output.terms, denominators)
            # DistributedDataParallel averages over processes; the denominators are already global.
            (loss * (s.world.size * s.scaler.scale)).backward()
        on_output(output)
        bad_loss |= ~torch.isfinite(loss.detach())
