"""A folder as `save_pretrained` of transformers leaves it, as far as its small files tell: config.json, the index."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.messages import ConfigError
from models.huggingface import Row, form_of
from naming import shorten

__all__ = ["Folder", "is_ours", "read_folder", "read_json"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Weights in files that execute what stands in them, or that other programs read.
OTHER_WEIGHTS = ("pytorch_model*.bin", "consolidated*.pth", "tf_model.h5", "flax_model.msgpack", "*.gguf")


@dataclass(frozen=True)
class Folder:
    """`fields`: what its config.json decides of `model_cfg`."""

    path: Path
    row: Row
    fields: dict[str, Any]

    @cached_property
    def index(self) -> dict[str, str] | None:
        """Tensor -> file of the weights, where there are several files. ConfigError if that is no such list."""
        path = self.path / INDEX
        if (self.path / WEIGHTS).is_file() or not path.is_file():
            return None
        files = read_json(path).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
            raise ConfigError(f"{path}: weight_map must say of each tensor which file it is in")
        if outside := sorted({f for f in files.values() if f != Path(f).name or f in ("", "..")}):
            raise ConfigError(f"{path}: names files that are not in its folder: {shorten(outside)}")
        return files

    @property
    def files(self) -> list[Path]:
        """Those of the weights. ConfigError says which of them are missing, or that there are none."""
        if self.index is None:
            if not (self.path / WEIGHTS).is_file():
                raise ConfigError(self._without_weights())
            return [self.path / WEIGHTS]
        files = [self.path / name for name in sorted(set(self.index.values()))]
        if missing := [f.name for f in files if not f.is_file()]:
            raise ConfigError(
                f"{self.path}: files of the weights are missing: {shorten(missing)} (by {INDEX})"
            )
        return files

    def _without_weights(self) -> str:
        other = sorted(f.name for pattern in OTHER_WEIGHTS for f in self.path.glob(pattern))
        if not other:
            return f"{self.path}: no weights: neither {WEIGHTS} nor {INDEX} is there"
        cls = self.row.classes[0]
        return (
            f"{self.path}: the weights are in {shorten(other)}, and {WEIGHTS} alone is read: nothing that is loaded is "
            f'executed. transformers converts them: python -c "from transformers import {cls}; '
            f"{cls}.from_pretrained('{self.path}').save_pretrained('NEW')\", and the tokenizer's files copied beside it"
        )


def read_folder(path: Path) -> Folder | None:
    """Such a folder; None where config.json is missing, or is one of ours. ConfigError says why it cannot be used."""
    config = path / CONFIG
    if not config.is_file():
        return None
    entries = read_json(config)
    if is_ours(entries):
        return None
    row = form_of(entries, str(config))
    folder = Folder(path, row, row.read(entries, str(config)))
    assert folder.files
    return folder


def is_ours(entries: dict[str, Any]) -> bool:
    """Whether a config.json is one that this trainer writes."""
    named = isinstance(entries.get("type"), str) and isinstance(entries.get("model_cfg"), dict)
    return named and "model_type" not in entries


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ConfigError if the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: a JSON object is needed, got a {type(found).__name__}")
    return found
