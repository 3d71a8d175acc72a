"""A folder as `save_pretrained` of transformers leaves it, as far as its small files tell: config.json, the index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.messages import ConfigError
from configs.saved import CONFIG, WEIGHTS, is_ours, read_json
from models.huggingface import Row, form_of
from naming import shorten

__all__ = ["Folder", "read_folder"]

INDEX = f"{WEIGHTS}.index.json"
# Weights in files that execute what stands in them, or that other programs read.
OTHER_WEIGHTS = ("pytorch_model*.bin", "consolidated*.pth", "tf_model.h5", "flax_model.msgpack", "*.gguf")


@dataclass(frozen=True)
class Folder:
    """`fields`: what its config.json decides of `model_cfg`; `files`: those of the weights; `index`: tensor -> name of
    its file, where there are several."""

    path: Path
    row: Row
    fields: dict[str, Any]
    files: list[Path]
    index: dict[str, str] | None


def read_folder(path: Path) -> Folder | None:
    """Such a folder; None where config.json is missing, or is one of ours. ConfigError says why it cannot be used."""
    config = path / CONFIG
    if not config.is_file():
        return None
    entries = read_json(config)
    if is_ours(entries):
        return None
    row = form_of(entries, str(config))
    fields, index = row.read(entries, str(config)), _index(path)
    return Folder(path, row, fields, _files(path, row, index), index)


def _index(path: Path) -> dict[str, str] | None:
    """Of several files of weights. A single one beside it wins, as in transformers."""
    index = path / INDEX
    if (path / WEIGHTS).is_file() or not index.is_file():
        return None
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
        raise ConfigError(f"{index}: weight_map must say of each tensor which file it is in")
    if outside := sorted({f for f in files.values() if f != Path(f).name or f in ("", "..")}):
        raise ConfigError(f"{index}: names files that are not in its folder: {shorten(outside)}")
    return files


def _files(path: Path, row: Row, index: dict[str, str] | None) -> list[Path]:
    files = [path / name for name in (sorted(set(index.values())) if index else [WEIGHTS])]
    missing = [file.name for file in files if not file.is_file()]
    if missing and index:
        raise ConfigError(f"{path}: files of the weights are missing: {shorten(missing)} (by {INDEX})")
    if missing:
        raise ConfigError(f"{path}: {_without_weights(path, row)}")
    return files


def _without_weights(path: Path, row: Row) -> str:
    other = sorted(f.name for pattern in OTHER_WEIGHTS for f in path.glob(pattern))
    if not other:
        return f"no weights: neither {WEIGHTS} nor {INDEX} is there"
    return (
        f"the weights are in {shorten(other)}, and {WEIGHTS} alone is read: nothing that is loaded is executed. "
        f'transformers converts them: python -c "from transformers import {row.classes[0]}; {row.classes[0]}.'
        f"from_pretrained('{path}').save_pretrained('NEW')\", and the tokenizer's files copied beside it"
    )
