"""LoRA for any architecture: which matrices of a model are adapted, and an adapter's model with and without them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adapters.rates import hold_still
from models.layers.lora import LowRank, adapt, merge_all, targets_of

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import RunConfig

__all__ = ["attach", "merge"]


def attach(adapter: ModelAdapter, cfg: RunConfig, base: str) -> None:
    """Freeze the model, which has the weights that are adapted, but for a memory that it reads, and put adapters beside
    the matrices that `cfg.lora_targets` names. `base`: what tells these weights from others.

    Raises:
        ValueError: a target cannot be adapted, or the rank is too large for it.
    """
    assert adapter.low_rank is None, "the model has adapters"
    wanted = cfg.lora_targets or list(adapter.lora_targets)
    if not wanted:
        raise ValueError(
            f"lora_targets: {type(adapter.model).__name__} does not say which of its matrices are adapted. Set "
            f"lora_targets=all-linear, or a list of names"
        )
    low_rank = LowRank(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    rules = adapter.param_roles()
    targets = targets_of(adapter.model, wanted, rules)
    on_meta = adapter.device.type == "meta"
    adapt(adapter.model, targets, low_rank, None if on_meta else torch.Generator().manual_seed(cfg.seed))
    adapter.low_rank, adapter.adapted, adapter.base = low_rank, tuple(targets), base
    for name in adapter.beside():
        adapter.model.get_parameter(name).requires_grad_(True)
    hold_still(adapter, cfg)


def merge(adapter: ModelAdapter) -> None:
    """Leave a model without adapters that computes the same to rounding; nothing where it has none."""
    if adapter.low_rank is None:
        return
    merge_all(adapter.model)
    adapter.freeze_external()
    adapter.low_rank, adapter.adapted, adapter.base = None, (), ""
