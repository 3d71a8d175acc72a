"""Adapters from a folder of PEFT, beside a base in the form of Hugging Face transformers that lies on this disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import adapter_class
from adapters.lora import attach, merge
from configs.saved import ADAPTER_CONFIG, adapted_base, read_json
from data.cache import kept_digest
from models.memory.pretrained import base_folder, model_digest
from naming import require_fit, shapes
from trainer.run.huggingface import HuggingFaceFolder
from trainer.run.source import Note, Source, load_weights
from trainer.run.tensor_files import read_tensors

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import ModelConfig, RunConfig
    from data.tokenizers import Tokenizer
    from trainer.session import Session

__all__ = ["ADAPTERS", "PREFIX", "AdaptersOfBase", "PeftFolder", "is_peft"]

ADAPTERS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name there
# What its configuration may say beside `_READ`, where this means LoRA as it is known here.
_OTHERWISE: dict[str, Any] = {
    **{"use_rslora": False, "use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}},
    **{"alpha_pattern": {}, "layers_to_transform": None, "lora_bias": False, "target_parameters": None},
    **{"exclude_modules": None, "layer_replication": None, "use_qalora": False},
    "alora_invocation_tokens": None,
}
# Others than these change the weights that adapters stand beside.
_BEGINNINGS = (True, False, None, "gaussian", "orthogonal")
_NUMBERS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "r": (int, lambda v: v > 0, "a positive whole number"),
    "lora_alpha": (int | float, lambda v: 0 < v < math.inf, "a positive number"),
    "lora_dropout": (int | float, lambda v: 0 <= v < 1, "at least 0 and below 1"),
}


def is_peft(path: str | Path) -> bool:
    return (Path(path) / ADAPTER_CONFIG).is_file()


def _entries(path: Path) -> dict[str, Any]:
    """What its configuration says. ValueError where this is no LoRA as it is known here."""
    entries = read_json(path / ADAPTER_CONFIG)
    if entries.get("peft_type") != "LORA":
        raise ValueError(f"{path / ADAPTER_CONFIG}: peft_type must be LORA, got {entries.get('peft_type')!r}")
    strange = [k for k, usual in _OTHERWISE.items() if entries.get(k) not in (usual, None, {}, [])]
    if strange:
        raise ValueError(
            f"{path / ADAPTER_CONFIG}: {strange[0]} is {entries[strange[0]]!r}, and adapters are known with "
            f"{_OTHERWISE[strange[0]]!r} alone"
        )
    if (begun := entries.get("init_lora_weights")) not in _BEGINNINGS:
        raise ValueError(
            f"{path / ADAPTER_CONFIG}: init_lora_weights is {begun!r}, which changes the weights that were adapted too"
        )
    for key, (kind, fits, allowed) in _NUMBERS.items():
        value = entries.get(key, 0.0 if key == "lora_dropout" else None)
        if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
            raise ValueError(f"{path / ADAPTER_CONFIG}: {key} must be {allowed}, got {value!r}")
    if not (path / ADAPTERS).is_file():
        raise ValueError(f"{path}: {ADAPTERS} is missing, and no other file is read, as none is executed")
    return entries


def _fields(entries: dict[str, Any]) -> dict[str, Any]:
    """Of a run with such adapters, but for what they stand beside."""
    return {
        "use_lora": True,
        "lora_rank": entries["r"],
        "lora_alpha": float(entries["lora_alpha"]),
        "lora_dropout": float(entries.get("lora_dropout", 0.0)),
    }


def _digest(path: Path, entries: dict[str, Any], base: str) -> str:
    """What tells adapters from others: their numbers, where and how strongly they act, and what they stand beside."""
    said = [
        kept_digest(path / ADAPTERS),
        base,
        *(entries.get(key) for key in ("r", "lora_alpha", "target_modules")),
    ]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _targets(path: Path, entries: dict[str, Any]) -> str | list[str]:
    """Names there of what is adapted."""
    given = entries.get("target_modules")
    if given in ("all-linear", None):
        return "all-linear"
    if isinstance(given, str):
        raise ValueError(f"{path / ADAPTER_CONFIG}: target_modules is a pattern. Name the modules")
    return list(given)


class PeftFolder(Source):
    """`adapter_config.json` names the base and the targets, `adapter_model.safetensors` holds A and B."""

    weights, adapts = "Hugging Face", True

    def __init__(self, path: Path, base: HuggingFaceFolder, entries: dict[str, Any]) -> None:
        super().__init__(path)
        self.base, self.entries = base, entries

    @classmethod
    def open(cls, path: Path, warn: Note) -> Source | None:
        if not is_peft(path):
            return None
        entries = _entries(path)
        named = adapted_base(path)
        base = HuggingFaceFolder.open(named, warn) if named else None
        if not isinstance(base, HuggingFaceFolder):
            raise ValueError(f"{named}, which {path} adapts, is no folder of Hugging Face transformers")
        return cls(path, base, entries)

    @property
    def type(self) -> str:
        return self.base.type

    @cached_property
    def digest(self) -> str:
        return _digest(self.path, self.entries, self.base.digest)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer

    def config(self, note: Note) -> tuple[RunConfig, ModelConfig]:
        """That of the base, with these adapters."""
        cfg, model_cfg = self.base.config(note)
        targets = _targets(self.path, self.entries)
        if not isinstance(targets, str):
            targets = sorted({n.removeprefix("model.").removeprefix("transformer.") for n in targets})
        return cfg.model_copy(update=_fields(self.entries) | {"lora_targets": targets}), model_cfg

    def fill(self, adapter: ModelAdapter) -> None:
        self.base.fill(adapter)
        cfg, _ = self.config(lambda text: None)
        attach(adapter, cfg, self.base.digest)
        found = read_tensors(self.path / ADAPTERS)
        prefix = PREFIX + adapter.model.hf_prefix
        ours = {
            name.removeprefix(prefix).removeprefix(PREFIX).removesuffix(".weight"): tensor
            for name, tensor in found.items()
        }
        wanted = {n: t for n, t in adapter.trained_state().items() if ".lora_" in n}
        require_fit(f"{self.path / ADAPTERS}", shapes(wanted), shapes(ours))
        adapter.model.load_state_dict(ours, strict=False)

    def begin(self, s: Session, note: Note) -> None:
        load_weights(s.adapter, self.whole(), str(self.path))


class AdaptersOfBase(Source):
    """Such a folder for a run that stands on the base itself, whatever model of transformers that is."""

    weights, adapts = "Hugging Face", True

    def __init__(self, path: Path, cfg: RunConfig, model_cfg: ModelConfig, note: Note) -> None:
        super().__init__(path)
        self.entries, self.cfg, self.model_cfg = _entries(path), cfg, model_cfg
        self._require_base(note)

    def _require_base(self, note: Note) -> None:
        """ValueError where the base that the folder names is here, and is another than the run's."""
        model_cfg: Any = self.model_cfg
        named, mine = self.entries.get("base_model_name_or_path"), model_cfg.base_model_name
        if not named or named == mine:
            return
        theirs = base_folder(named, self.entries.get("revision"))
        if theirs is None or not (theirs / "config.json").is_file():
            note(
                f"{self.path} adapts {named}, which is not on this machine: whether {mine} is the same is not known"
            )
        elif model_digest(theirs, kept_digest) != model_digest(model_cfg.folder, kept_digest):
            raise ValueError(
                f"init_from_checkpoint: {self.path} adapts {named}, and model_cfg.base_model_name={mine} is another "
                f"model: its weights or its config.json differ"
            )

    @cached_property
    def digest(self) -> str:
        return _digest(self.path, self.entries, "")

    @classmethod
    def open(cls, path: Path, warn: Note) -> Source | None:
        raise TypeError("it is known by the run alone")

    @property
    def type(self) -> str:
        return self.cfg.type

    @cached_property
    def tokenizer(self) -> Tokenizer:
        found = adapter_class(self.cfg).own_tokenizer(self.model_cfg)
        assert found is not None
        return found

    def config(self, note: Note) -> tuple[RunConfig, ModelConfig]:
        """The run's, without adapters of its own."""
        return self.cfg.model_copy(update={"use_lora": False}), self.model_cfg

    def fill(self, adapter: ModelAdapter) -> None:
        ours = {
            there.removesuffix(".weight"): here.removesuffix(".weight")
            for here, there in adapter.model.hf_names().items()
        }
        given = _targets(self.path, self.entries)
        targets = given if isinstance(given, str) else [ours.get(name, name) for name in given]
        attach(
            adapter, self.cfg.model_copy(update=_fields(self.entries) | {"lora_targets": targets}), base=""
        )
        found = {}
        for name, tensor in read_tensors(self.path / ADAPTERS).items():
            module, _, leaf = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            found[f"{ours.get(module, module)}.{leaf}"] = tensor
        wanted = {n: t for n, t in adapter.trained_state().items() if ".lora_" in n}
        require_fit(f"{self.path / ADAPTERS}", shapes(wanted), shapes(found))
        adapter.model.load_state_dict(found, strict=False)

    def begin(self, s: Session, note: Note) -> None:
        self.fill(s.adapter)
        merge(s.adapter)
