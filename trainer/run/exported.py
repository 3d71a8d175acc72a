"""What `export --to safetensors` and `--to memory` write, read back: weights of any architecture, as `eval` and
`generate` use them, and a memory beside a base that stays as it is."""

from __future__ import annotations

from pathlib import Path

import torch

from adapters.base import ModelAdapter
from configs.saved import (
    EXPORT,
    EXPORTED,
    MEMORY,
    MEMORY_ALONE,
    MEMORY_WEIGHTS,
    Export,
    Memory,
    is_export,
    lacking,
)
from models.memory.quant import unpacked_state
from trainer.run.checkpoint import damage
from trainer.run.source import Note, Source, Trained
from trainer.run.tensor_files import WEIGHTS, read_tensors

__all__ = ["Exported", "MemoryAlone"]


class Exported(Trained):
    """Such a folder, whose digests have been checked. It holds either the average of the weights or the raw ones."""

    file = WEIGHTS

    def __init__(self, path: Path, record: str = EXPORT, kind: type[Export] = Export) -> None:
        super().__init__(path, record, kind)
        self.weights, self.rounded = self.recorded["weights"], self.recorded["rounded"]
        self.shared = self.recorded["shared"]

    @classmethod
    def open(cls, path: Path, warn: Note) -> Source | None:
        if not is_export(path):
            return None
        if problem := lacking(path) or damage(path, EXPORTED, may_link=True):
            raise ValueError(f"{path} is damaged: {problem}. Export it again")
        return cls(path)

    def state(self) -> dict[str, torch.Tensor]:
        tensors = unpacked_state(read_tensors(self.path / self.file))
        return tensors | {name: tensors[kept] for name, kept in self.shared.items() if kept in tensors}

    def fill(self, adapter: ModelAdapter) -> None:
        super().fill(adapter)
        if self.rounded:  # points of a set need not lie on it any more
            adapter.constrain(torch.zeros((), device=adapter.device))


class MemoryAlone(Exported):
    """A memory, all else of whose model is a pretrained base: that is read where config.json says, and must have the
    digest that stands there."""

    file = MEMORY_WEIGHTS

    @classmethod
    def open(cls, path: Path, warn: Note) -> Source | None:
        if not ((path / MEMORY).is_file() or (path / MEMORY_WEIGHTS).is_file()):
            return None
        if problem := lacking(path, MEMORY_ALONE) or damage(path, MEMORY_ALONE, may_link=True):
            raise ValueError(f"{path} is damaged: {problem}. Export it again")
        found = cls(path, MEMORY, Memory)
        if not found.recorded["whole"]:
            raise ValueError(
                f"{path} holds the memory of a model of type {found.type} alone, and what else was trained is not "
                f"there. Give the run that it is of, or what export --to safetensors makes of that"
            )
        return found
