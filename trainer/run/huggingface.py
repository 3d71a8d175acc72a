"""Weights from a folder of Hugging Face transformers, for the architectures of `models.huggingface.ROWS`."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.files import CONFIGS, read_model
from configs.validate import validate
from configs.weights import take_sizes
from models.huggingface.folder import Folder, read_folder
from trainer.run.shards import Shards
from trainer.run.source import Note, Source

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import ModelConfig, RunConfig
    from data.tokenizers import Tokenizer

__all__ = ["HuggingFaceFolder"]


class HuggingFaceFolder(Source):
    """config.json gives the sizes, tokenizer.json the tokens, safetensors the weights. What they were trained on is not
    known."""

    weights = "Hugging Face"

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder.path)
        self.folder = folder
        self.tensors = Shards(folder.files, folder.index)  # damage is found before any text is read

    @classmethod
    def open(cls, path: Path, warn: Note) -> Source | None:
        folder = read_folder(path)
        return cls(folder) if folder else None

    @property
    def type(self) -> str:
        return self.folder.row.type

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from data.huggingface.folder import read_huggingface_tokenizer

        return read_huggingface_tokenizer(self.path, self.folder.fields["vocab_size"])

    def config(self, note: Note) -> tuple[RunConfig, ModelConfig]:
        """What a run from it would have: the architecture's own file with these sizes."""
        # Without Hydra, whose state belongs to the process: this may be somebody's notebook.
        tree: dict[str, Any] = {}
        for node in read_model(CONFIGS / f"{self.type}.yaml").chain():
            tree |= node.values
        tree |= {"init_from_checkpoint": str(self.path), "preset": "none"}
        return validate(tree, take_sizes(tree, set(), []))

    def fill(self, adapter: ModelAdapter) -> None:
        load = getattr(adapter.model, "from_hf_state_dict", None)
        if load is None:
            raise ValueError(
                f"{self.path}: a {type(adapter.model).__name__} does not read the weights of transformers; the model "
                f"of type {self.type} does"
            )
        try:
            load(self.tensors)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
