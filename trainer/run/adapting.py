"""The weights that a run with LoRA adapts: from what its `init_from_checkpoint` names, whenever its model is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.lora import attach, merge
from naming import expand_path
from trainer.run.peft import AdaptersOfBase, is_peft
from trainer.run.source import Source, open_source

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import ModelConfig, RunConfig

__all__ = ["give_adapters", "source_of"]


def source_of(cfg: RunConfig, model_cfg: ModelConfig, note: Callable[[str], None]) -> Source:
    """The weights that a run begins from. ValueError as `open_source`."""
    path = expand_path(str(cfg.init_from_checkpoint))
    if model_cfg.elsewhere and is_peft(path):
        return AdaptersOfBase(path, cfg, model_cfg, note)
    return open_source(path, note)


def give_adapters(adapter: ModelAdapter, cfg: RunConfig, note: Callable[[str], None]) -> Source | None:
    """Fill the model with the weights that `cfg` adapts, and put its adapters beside them; the source of the weights,
    None where the model has loaded them itself. Adapters that the source itself has are added to its weights first.

    Raises:
        ValueError: the weights are not there any more or do not fit, or a target cannot be adapted.
    """
    if cfg.init_from_checkpoint is None:
        assert adapter.provenance(), "adapters stand beside weights that were trained"
        attach(adapter, cfg, base="")
        return None
    if not Path(cfg.init_from_checkpoint).exists():
        raise ValueError(
            f"init_from_checkpoint: {cfg.init_from_checkpoint} is not there, whose weights this run adapts and does "
            f"not keep itself. Put it back"
        )
    source = source_of(cfg, adapter.model_cfg, note)
    source.fill_as_scored(adapter)
    merge(adapter)
    attach(adapter, cfg, source.digest)
    return source
