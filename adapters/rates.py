"""Learning rates of components: which parameters have a rate of their own, and which stay as they are at one of 0."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import RunConfig

__all__ = ["BESIDE", "COMPONENTS", "hold_still", "stated_rate"]

# Roles that are no part of an architecture's recipe: AdamW steps them, at the first of these rates that is not null.
COMPONENTS = {
    "adapter": ("lora_lr",),
    "memory": ("memory_lr",),
    "memory_bank": ("memory_bank_lr", "memory_lr"),
}
BESIDE = ("memory", "memory_bank")  # roles of what LoRA leaves to be trained with its adapters
_BASE = ("base_model_lr",)  # of every other role


def stated_rate(role: str, cfg: RunConfig) -> float | None:
    """The rate of a component, or the one that stands in place of the optimizer's own; None: that one itself."""
    return next(
        (rate for name in COMPONENTS.get(role, _BASE) if (rate := getattr(cfg, name)) is not None), None
    )


def hold_still(adapter: ModelAdapter, cfg: RunConfig) -> None:
    """Take the gradients off what has a rate of 0: no backward pass makes any, no optimizer and no average has it.
    Checkpoints keep it all the same, as it is nowhere else.

    Raises:
        ValueError: nothing is left to train.
    """
    if not any(getattr(cfg, name) == 0 for names in (_BASE, *COMPONENTS.values()) for name in names):
        return
    rules = adapter.param_roles()
    found: dict[str, None] = {}
    left = 0
    for name, parameter in adapter.named_model_parameters():
        if not parameter.requires_grad:
            continue
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
        if (
            rule and stated_rate(rule.role, cfg) == 0
        ):  # one that no rule matches is told of with the optimizers
            parameter.requires_grad_(False)
            found[rule.role] = None
        else:
            left += 1
    if found and not left:
        fields = [name for role in found for name in COMPONENTS.get(role, _BASE) if getattr(cfg, name) == 0]
        nearest = [*(f"{name}=null" for name in fields if name == "base_model_lr"), "a rate above 0"]
        raise ValueError(
            f"{', '.join(sorted(set(fields)))}: at 0 nothing of this model is left to train (its roles: "
            f"{', '.join(found)}). Nearest: {' or '.join(dict.fromkeys(nearest))}"
        )
    adapter.still = tuple(found)
