"""Why a step was not finite. Data and noise are functions of the step, so the step can be run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.base import weighted_loss
from trainer.precision import autocast

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from trainer.batching import StepBatch

__all__ = ["explain_non_finite", "non_finite"]


def _bad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and not bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return any(_bad(v) for v in value)
    return False


def non_finite(adapter: ModelAdapter) -> list[str]:
    """Names of the trained parameters of which some number is not finite."""
    named = [(name, p.detach()) for name, p in adapter.named_model_parameters() if p.requires_grad]
    if not named:
        return []
    whole = torch.stack([torch.isfinite(p).all() for _, p in named]).tolist()  # waits for the device once
    return [name for (name, _), finite in zip(named, whole, strict=True) if not finite]


def explain_non_finite(
    adapter: ModelAdapter,
    batch: StepBatch,
    precision: str,
    device: torch.device,
    total_steps: int,
    seed: Callable[[int], object],
) -> str:
    """Replay a step and name what went wrong first: a parameter, a module's output, a loss term, a gradient.

    `seed(i)` seeds dropout for micro-batch i, as training did.
    """
    adapter.on_step_start(batch.ctx, total_steps)
    for name, parameter in adapter.named_model_parameters():
        if _bad(parameter.detach()):
            return f"parameter {name} is not finite before the step: an earlier update left it so"
    first: list[str] = []
    hooks = [
        module.register_forward_hook(_recorder(name, first))
        for name, module in adapter.model.named_modules()
        if name and not any(True for _ in module.children())
    ]
    try:
        for index, prepared in enumerate(batch.micro):
            adapter.zero_grad(set_to_none=True)
            seed(index)
            with autocast(precision, device):
                output = adapter(prepared.to(device))
            if first:
                return f"the first module with a non-finite output is {first[0]}"
            for name, term in output.terms.items():
                if _bad(term.sum.detach()):
                    return f"loss term {name!r} is {term.sum.item()}; every module's output is finite"
            weighted_loss(output.terms, batch.denominators).backward()
            worst = [n for n, p in adapter.named_model_parameters() if p.grad is not None and _bad(p.grad)]
            if worst:
                return f"the loss is finite, but the gradient of {worst[-1]} is not ({len(worst)} in all)"
    finally:
        for hook in hooks:
            hook.remove()
        adapter.zero_grad(set_to_none=True)
    return "the replay of the step was finite: the cause lies outside the model (exchange between processes, hardware)"


def _recorder(name: str, first: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if not first and _bad(output):
            first.append(f"{name} ({type(module).__name__})")

    return record
