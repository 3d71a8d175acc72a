"""The gradients of several processes, exchanged while they are computed; and what a process does that must break a step
off, so that the others are not left waiting for it."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adapters.base import Prepared

if TYPE_CHECKING:
    from adapters.base import ModelAdapter

__all__ = ["DataParallel"]


class _MicroBatch(nn.Module):
    """What is wrapped: the adapter, or nothing where there is no micro-batch."""

    def __init__(self, adapter: ModelAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, prepared: Prepared | None) -> Any:
        return None if prepared is None else self.adapter(prepared)


def _note(arrived: set[int], parameter: Tensor) -> None:
    arrived.add(id(parameter))


class DataParallel(DistributedDataParallel):
    """DistributedDataParallel around an adapter, that can also be left in the middle of a step.

    The last backward pass of a step exchanges the gradients in pieces, as they become known, and every process waits
    for the pieces of all. One that has run out of memory calls `give_up`, and the others come to their end.
    """

    def __init__(self, adapter: ModelAdapter, process_group: Any) -> None:
        """Buffers are not broadcast: every process computes the same ones, from what `add_up` gives. What comes from
        elsewhere every process has loaded by itself."""
        module = _MicroBatch(adapter)
        names = [n for n, _ in [*adapter.model.named_parameters(), *adapter.model.named_buffers()]]
        external = [f"adapter.model.{n}" for n in names if adapter.is_external(n)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, external)
        with warnings.catch_warnings():
            # torch 2.13 wants another word for it, one that exchanges buffers at the start.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            super().__init__(
                module, process_group=process_group, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        self._exchanging = False  # between the forward pass of a step's last micro-batch and the next one
        self._arrived: set[int] = set()  # parameters whose gradient this backward pass has found
        self._trained = [p for p in adapter.parameters() if p.requires_grad]
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(partial(_note, self._arrived))

    def forward(self, prepared: Prepared | None) -> Any:
        self._exchanging = False
        output = super().forward(prepared)
        self._exchanging = self.require_backward_grad_sync
        self._arrived.clear()
        return output

    def give_up(self) -> None:
        """Take part in what is left of this step's exchange, with gradients of zero. Then every process has wrong
        gradients, and drops them."""
        if not self._exchanging:
            self(None)
        left = [p for p in self._trained if id(p) not in self._arrived]
        if left:  # their gradients become known as others do, in the same pieces
            zero = torch.zeros((), device=left[0].device)
            torch.autograd.backward(left, [zero.to(p.dtype).expand_as(p) for p in left])
        self._exchanging = False
