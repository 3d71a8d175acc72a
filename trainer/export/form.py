"""What a form of export is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from configs.saved import WEIGHTS
from trainer.export.rounding import Rounding

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import ModelConfig, RunConfig
    from trainer.run.restore import Restored

__all__ = ["Contents", "Form", "require_nothing_added"]


@dataclass(frozen=True)
class Contents:
    """What goes into the folder beside the weights; `notes` are sentences for the user. The tensors share no memory."""

    tensors: Mapping[str, Tensor]
    files: Mapping[str, dict[str, Any] | str]  # name -> JSON values, or text
    notes: tuple[str, ...] = ()


class Form(ABC):
    file = WEIGHTS  # of the weights
    digests = False  # whether digests.json goes with it, by which a damaged file is known

    @abstractmethod
    def check(self, cfg: RunConfig, model_cfg: ModelConfig) -> None:
        """ValueError if this form has no place for such a model. Asked before any weights are read."""

    def adds_up(self, adapter: ModelAdapter) -> bool:
        """Whether what adapters say is added to the weights first."""
        return True

    @abstractmethod
    def contents(self, restored: Restored, rounding: Rounding) -> Contents:
        """The folder's contents; every parameter goes through `rounding`. ValueError as above."""

    @abstractmethod
    def opened_by(self, folder: Path, contents: Contents) -> list[str]:
        """Lines that open the folder, for people to copy."""


def require_nothing_added(model_cfg: ModelConfig) -> None:
    """ValueError where the model has what forms of others know nothing of."""
    if added := model_cfg.added():
        raise ValueError(
            f"to: transformers and PEFT have no place for {added}, and without it the weights compute something else. "
            f"--to safetensors keeps it, with the adapters, beside the base"
        )
