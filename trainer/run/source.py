"""Where weights come from that were trained elsewhere: a folder with an architecture, a tokenizer and weights.

`open_source` recognises what a path names, by the kinds of `KINDS`. A run begins from one (`init_from_checkpoint`), and
`generate`, `eval` and `load` open one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.validate import read_saved
from data.tokenizers import Tokenizer, load_tokenizer
from naming import expand_path, load, require_fit, shapes
from trainer.run.checkpoint import find_checkpoint, load_json, load_tensors

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import ModelConfig, RunConfig
    from trainer.session import Session

__all__ = ["KINDS", "Checkpoint", "Source", "load_weights", "open_source", "require_same_provenance"]

Note = Callable[[str], None]

# "package.module:Class", asked in this order; the last is what any other folder is taken for.
KINDS = ("trainer.run.source:Checkpoint",)


class Source(ABC):
    """A folder of trained weights. Nothing in it is executed."""

    data: dict[str, Any] | None = (
        None  # what tells the text apart that they were trained on, where that is known
    )
    rows = 16  # of a forward pass: where they were scored before, as then

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @abstractmethod
    def open(cls, path: Path, warn: Note) -> Source | None:
        """What a path names, None if it is of another kind. ValueError if it is of this one and cannot be used."""

    @property
    @abstractmethod
    def type(self) -> str:
        """The architecture."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The one whose ids the weights know."""

    @property
    def tokenizer_names(self) -> tuple[str, ...]:
        """What a run may call that tokenizer (`tokenizer=`), beside `auto`."""
        return (self.tokenizer.name,)

    @abstractmethod
    def config(self, note: Note) -> tuple[RunConfig, ModelConfig]:
        """What they were trained with, as far as it is known; the sizes always are."""

    @abstractmethod
    def fill(self, adapter: ModelAdapter) -> None:
        """Load the weights into a model of this architecture. ValueError lists what does not fit."""

    def average(self) -> dict[str, torch.Tensor] | None:
        """Their average over training by parameter name, where one was kept."""
        return None

    def begin(self, s: Session, note: Note) -> None:
        """Load the weights into a run that begins with them."""
        self.fill(s.adapter)


class Checkpoint(Source):
    """A checkpoint of a run, whose digests have been checked."""

    data: dict[str, Any]

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.architecture = load_json(path, "config.json")
        self.state = load_json(path, "training_state.json")
        self.data, self.rows = self.state["data"], self.architecture["batch_size"]

    @classmethod
    def open(cls, path: Path, warn: Note) -> Source | None:
        return cls(find_checkpoint(path, warn))

    @property
    def type(self) -> str:
        return self.architecture["type"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path / "tokenizer.json")

    @property
    def tokenizer_names(self) -> tuple[str, ...]:
        then = self.state["training_config"].get("tokenizer")
        return (*super().tokenizer_names, *([then] if then else []))

    def config(self, note: Note) -> tuple[RunConfig, ModelConfig]:
        notes: list[str] = []
        found = read_saved(
            self.state["training_config"], self.architecture["model_cfg"], str(self.path), notes
        )
        for text in notes:
            note(text)
        return found

    def fill(self, adapter: ModelAdapter) -> None:
        self._fill(adapter, load_tensors(self.path, "model.pt"))

    def begin(self, s: Session, note: Note) -> None:
        from trainer.run.fitted import with_own_fits

        self._fill(s.adapter, with_own_fits(s, self, load_tensors(self.path, "model.pt"), note))

    def _fill(self, adapter: ModelAdapter, state: dict[str, torch.Tensor]) -> None:
        require_same_provenance(adapter, self.architecture, self.path)
        load_weights(adapter, state, f"{self.path}/model.pt")

    def average(self) -> dict[str, torch.Tensor] | None:
        if not (self.path / "ema.pt").is_file():
            return None
        return load_tensors(self.path, "ema.pt")["shadow"]


def open_source(given: str | Path, warn: Note) -> Source:
    """The weights that a person names. ValueError says why there are none; `warn` hears what was passed over."""
    path = expand_path(given)
    for spec in KINDS:
        if (found := load(spec).open(path, warn)) is not None:
            return found
    raise AssertionError("the last kind takes every path")


def load_weights(adapter: ModelAdapter, state: dict[str, torch.Tensor], source: str) -> None:
    """Exact match of names and shapes, or a ValueError that lists the differences. External parts keep their own."""
    require_fit(source, shapes(adapter.trained_state()), shapes(state))
    adapter.model.load_state_dict(state, strict=False)


def require_same_provenance(adapter: ModelAdapter, saved: dict[str, Any], source: Path) -> None:
    """`saved`: the config.json of a checkpoint, whose weights belong to the external parts they were trained with."""
    theirs, mine = saved.get("provenance") or {}, adapter.provenance()
    differing = [k for k in sorted({*theirs, *mine}) if theirs.get(k) != mine.get(k)]
    if differing:
        told = "; ".join(
            f"{k} was {theirs.get(k, 'not there')}, here it is {mine.get(k, 'not there')}" for k in differing
        )
        raise ValueError(
            f"{source} was trained on another base: {told}. Give the base that it was trained on"
        )
