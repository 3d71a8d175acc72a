"""What `export --to safetensors` writes, read back: weights of any architecture, as `eval` and `generate` use them."""

from __future__ import annotations

from pathlib import Path

import torch

from adapters.base import ModelAdapter
from configs.saved import EXPORT, EXPORTED, Export, is_export, lacking
from models.memory.quant import unpacked_state
from trainer.run.checkpoint import damage
from trainer.run.source import Note, Source, Trained
from trainer.run.tensor_files import WEIGHTS, read_tensors

__all__ = ["Exported"]


class Exported(Trained):
    """Such a folder, whose digests have been checked. It holds either the average of the weights or the raw ones."""

    file = WEIGHTS

    def __init__(self, path: Path) -> None:
        super().__init__(path, EXPORT, Export)
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
