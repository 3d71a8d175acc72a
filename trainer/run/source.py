"""Where weights come from that were trained elsewhere: a folder with an architecture, a tokenizer and weights.

`open_source` recognises what a path names, by the kinds of `KINDS`. A run begins from one (`init_from_checkpoint`), and
`generate`, `eval` and `load` open one.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from adapters import build_adapter
from adapters.lora import merge
from configs.saved import Architecture, WeightsAre, read_record, told
from configs.saved import Trained as Record
from configs.validate import read_saved
from configs.weights import not_weights
from data.cache import file_digest
from data.tokenizers import Tokenizer, load_tokenizer
from models import resolve
from naming import expand_path, load, require_fit, shapes, shorten
from trainer.run.checkpoint import (
    STATE,
    NotAsWritten,
    checkpoints_in,
    damage,
    find_checkpoint,
    load_named_tensors,
)

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import ModelConfig, RunConfig
    from trainer.session import Session

__all__ = [
    "KINDS",
    "Checkpoint",
    "Source",
    "Trained",
    "load_weights",
    "open_source",
    "require_same_provenance",
]

Note = Callable[[str], None]
_NO_WEIGHTS = ("optimizer.pt",)

# "package.module:Class", asked in this order; the last is what any other folder is taken for.
KINDS = (
    "trainer.run.exported:Exported",
    "trainer.run.exported:MemoryAlone",
    "trainer.run.peft:PeftFolder",
    "trainer.run.huggingface:HuggingFaceFolder",
    "trainer.run.source:Checkpoint",
)


class Source(ABC):
    """A folder of trained weights. Nothing in it is executed that the user has not said to trust."""

    data: dict[str, Any] | None = (
        None  # what tells the text apart that they were trained on, where that is known
    )
    rows = 16  # of a forward pass: where they were scored before, as then
    weights: WeightsAre = "raw"  # what `fill` loads
    adapts = False  # whether they are those of adapters, beside the weights of another source

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

    @property
    def averaged(self) -> bool:
        """Whether `fill` loads an average, beside which no other weights were kept."""
        return self.weights == "EMA"

    def average(self) -> dict[str, torch.Tensor] | None:
        """Their average over training by parameter name, where one was kept beside them."""
        return None

    def before(self, warn: Note) -> Source | None:
        """What else is meant where the content of this turns out to be other than was saved. None for nothing."""
        return None

    def begin(self, s: Session, note: Note) -> None:
        """Load the weights into a run that begins with them."""
        self.fill(s.adapter)

    def fill_as_scored(self, adapter: ModelAdapter) -> bool:
        """Load the weights that it is scored with: their average, where one was kept beside them; whether it was."""
        self.fill(adapter)
        average = self.average()
        if average is None:
            return False
        own = {name: p for name, p in adapter.named_model_parameters() if name in average}
        require_fit(f"the average in {self.path}", shapes(own), shapes({name: average[name] for name in own}))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(average[name])
        # An average of points of a set need not lie on it.
        adapter.constrain(torch.zeros((), device=adapter.device))
        return True

    def whole(self) -> dict[str, torch.Tensor]:
        """The weights by our names, what adapters say added to those that they belong to."""
        cfg, model_cfg = self.config(lambda text: None)
        adapter = build_adapter(cfg, model_cfg, self.tokenizer)
        self.fill_as_scored(adapter)
        merge(adapter)
        return adapter.trained_state()

    @cached_property
    def digest(self) -> str:
        """What tells these weights from all others: sha256 over the files that hold some, by name."""
        found = hashlib.sha256()
        for path in sorted(self.path.iterdir()):
            if path.suffix in (".pt", ".safetensors", ".bin") and path.name not in _NO_WEIGHTS:
                found.update(f"{path.name} {file_digest(path)}\n".encode())
        return found.hexdigest()


class Trained(Source):
    """Weights that were trained here: beside them lie config.json, our tokenizer.json and what the run recorded."""

    file: str  # of the weights

    def __init__(self, path: Path, record: str, kind: type[Record]) -> None:
        """`record`: the file that says how they came about; `kind`: what it must say. ValueError if it does not."""
        super().__init__(path)
        self.architecture = read_record(path / "config.json", Architecture)
        self.recorded, self.record = read_record(path / record, kind), record
        self.data, self.rows = self.recorded["data"], self.architecture["batch_size"]
        self.adapts = bool(self.recorded["training_config"].get("use_lora"))

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """The weights by our names."""

    @property
    def type(self) -> str:
        return self.architecture["type"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        found = load_tokenizer(self.path / "tokenizer.json")
        if (then := (self.data or {}).get("tokenizer_digest")) not in (None, found.digest):
            raise ValueError(
                f"{self.path}: tokenizer.json ({found.name}, {found.digest[:8]}) is not the one that the weights were "
                f"trained with ({then[:8]}): its ids mean other text. Put that one back"
            )
        return found

    @property
    def tokenizer_names(self) -> tuple[str, ...]:
        then = self.recorded["training_config"].get("tokenizer")
        return (*super().tokenizer_names, *([then] if then else []))

    def config(self, note: Note) -> tuple[RunConfig, ModelConfig]:
        notes: list[str] = []
        generic, model_cfg = self.recorded["training_config"], self.architecture["model_cfg"]
        if self.type != generic.get("type"):
            differ = f"type is {self.type!r} in config.json, and {generic.get('type')!r} in {self.record}"
            raise NotAsWritten(f"{self.path}: {differ}")
        try:
            found = read_saved(generic, model_cfg, str(self.path), notes)
        except ValidationError as error:
            raise NotAsWritten(f"{self.path} says what no run can: {'; '.join(told(error))}") from None
        for text in notes:
            note(text)
        return found

    def fill(self, adapter: ModelAdapter) -> None:
        if self.adapts:
            self._adapt(adapter)
        state = self.state()
        if type(adapter.model) is not load(resolve(self.type).model):  # beside which it may have more
            state = adapter.with_added(state)
        self._fill(adapter, state)

    def _adapt(self, adapter: ModelAdapter) -> None:
        """Give a model what it was trained beside: the weights of the base, and adapters."""
        from trainer.run.adapting import give_adapters

        cfg, _ = self.config(lambda text: None)
        give_adapters(adapter, cfg, lambda text: None)

    def begin(self, s: Session, note: Note) -> None:
        from trainer.run.fitted import with_own_fits

        self._fill(s.adapter, with_own_fits(s, self, self.whole() if self.adapts else self.state(), note))

    def _fill(self, adapter: ModelAdapter, state: dict[str, torch.Tensor]) -> None:
        if adapter.low_rank or not self.adapts:  # of adapters that were added up the base is no matter
            require_same_provenance(adapter, self.architecture, self.path)
        load_weights(adapter, state, f"{self.path}/{self.file}")


class Checkpoint(Trained):
    """A checkpoint of a run, whose digests have been checked."""

    file = "model.pt"

    def __init__(self, path: Path, run: Path | None = None) -> None:
        """`run`: the folder that was named, where it is that of the run."""
        super().__init__(path, STATE, Record)
        self.run = run

    @classmethod
    def open(cls, path: Path, warn: Note) -> Source | None:
        if problem := not_weights(path):
            raise ValueError(problem)
        found = find_checkpoint(path, warn, _unreadable)
        return cls(found, None if found == path else path)

    def before(self, warn: Note) -> Source | None:
        found = checkpoints_in(self.run) if self.run else []
        for path in reversed(found[: found.index(self.path)] if self.path in found else []):
            if _unreadable(path) is None:
                return Checkpoint(path, self.run)
        return None

    def fill_as_scored(self, adapter: ModelAdapter) -> bool:
        with self._of_this_model():
            return super().fill_as_scored(adapter)

    def fill(self, adapter: ModelAdapter) -> None:
        with self._of_this_model():
            super().fill(adapter)

    @contextmanager
    def _of_this_model(self) -> Iterator[None]:
        """The model was made as config.json has it: weights that do not fit it are none that were saved with that."""
        try:
            yield
        except NotAsWritten:
            raise
        except ValueError as error:
            raise NotAsWritten(str(error)) from error

    def state(self) -> dict[str, torch.Tensor]:
        return load_named_tensors(self.path, self.file)

    def average(self) -> dict[str, torch.Tensor] | None:
        if not (self.path / "ema.pt").is_file():
            return None
        return load_named_tensors(self.path, "ema.pt", "shadow")


def _unreadable(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint as a source of weights, as far as is known before these are read."""
    if problem := damage(checkpoint):
        return problem
    try:
        _ = Checkpoint(checkpoint).tokenizer
    except ValueError as error:
        return str(error)
    return None


def open_source(given: str | Path, warn: Note) -> Source:
    """The weights that a person names. ValueError says why there are none; `warn` hears what was passed over."""
    path = expand_path(given)
    for spec in KINDS:
        if (found := load(spec).open(path, warn)) is not None:
            return found
    raise AssertionError("the last kind takes every path")


def load_weights(adapter: ModelAdapter, state: dict[str, torch.Tensor], source: str) -> None:
    """Exact match of names and shapes, and floats where floats are, or a ValueError that lists the differences.
    External parts keep their own."""
    own = adapter.trained_state()
    require_fit(source, shapes(own), shapes(state))
    coded = [
        f"{name} is {tensor.dtype}, needed is {own[name].dtype}"
        for name, tensor in state.items()
        if tensor.is_floating_point() != own[name].is_floating_point()
    ]
    if coded:
        raise ValueError(f"{source} holds other numbers than this model: {shorten(coded)}")
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
