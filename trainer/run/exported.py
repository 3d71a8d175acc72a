"""What `export --to safetensors` writes, read back: weights of any architecture, as `eval` and `generate` use them."""

from __future__ import annotations

from pathlib import Path

import torch

from adapters.base import ModelAdapter
from models.huggingface.folder import is_ours, read_json
from trainer.run.checkpoint import damage, load_json
from trainer.run.source import Note, Source, Trained
from trainer.run.tensor_files import WEIGHTS, read_tensors

__all__ = ["FILES", "RECORD", "Exported"]

RECORD = "export.json"  # by which such a folder is known
FILES = ("config.json", "tokenizer.json", WEIGHTS, RECORD)


class Exported(Trained):
    """Such a folder, whose digests have been checked. It holds either the average of the weights or the raw ones."""

    file = WEIGHTS

    def __init__(self, path: Path) -> None:
        super().__init__(path, load_json(path, RECORD))
        self.weights, self.rounded = self.recorded["weights"], self.recorded["rounded"]
        self.shared = dict(self.recorded["shared"])

    @classmethod
    def open(cls, path: Path, warn: Note) -> Source | None:
        missing = [name for name in FILES if not (path / name).is_file()]
        if RECORD in missing and (missing != [RECORD] or not is_ours(read_json(path / "config.json"))):
            return None
        if problem := f"it lacks {', '.join(missing)}" if missing else damage(path):
            raise ValueError(f"{path} is damaged: {problem}. Export it again")
        try:
            return cls(path)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: {RECORD} or config.json is not what export writes: {error!r}"
            ) from None

    def state(self) -> dict[str, torch.Tensor]:
        tensors = read_tensors(self.path / self.file)
        return tensors | {name: tensors[kept] for name, kept in self.shared.items() if kept in tensors}

    def fill(self, adapter: ModelAdapter) -> None:
        super().fill(adapter)
        if self.rounded:  # points of a set need not lie on it any more
            adapter.constrain(torch.zeros((), device=adapter.device))
