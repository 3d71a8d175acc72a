"""The small files beside weights: how a folder of `export` is known, and what those that were trained here must say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, PositiveInt, ValidationError

from configs.formats.text import require_file
from configs.messages import ConfigError
from naming import shorten_text

__all__ = [
    "ADAPTER_CONFIG",
    "CONFIG",
    "EXPORT",
    "EXPORTED",
    "MEMORY",
    "MEMORY_ALONE",
    "MEMORY_WEIGHTS",
    "Architecture",
    "Export",
    "Memory",
    "Text",
    "Trained",
    "WEIGHTS",
    "WeightsAre",
    "adapted_base",
    "is_export",
    "is_ours",
    "lacking",
    "read_json",
    "read_record",
    "told",
]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
EXPORT = "export.json"
EXPORTED = (CONFIG, "tokenizer.json", WEIGHTS, EXPORT)
# Of `export --to memory`.
MEMORY, MEMORY_WEIGHTS = "memory.json", "memory.safetensors"
MEMORY_ALONE = (CONFIG, "tokenizer.json", MEMORY_WEIGHTS, MEMORY)

# What weights are, in a word: an average over training, the trained ones themselves, or from where that is not known.
WeightsAre = Literal["EMA", "raw", "Hugging Face", "untrained"]


class _Record(BaseModel):
    """Entries that something here reads; others may stand beside them."""

    model_config = ConfigDict(strict=True)


def _sizes(entries: dict[str, Any]) -> dict[str, Any]:
    if wrong := [k for k, v in entries.items() if isinstance(v, int) and abs(v) >= 2**63]:
        raise ValueError(f"no size is {entries[wrong[0]]}")
    return entries


class Architecture(_Record):
    """config.json"""

    type: str
    model_cfg: Annotated[dict[str, Any], AfterValidator(_sizes)]
    model_adapter: str | None = None
    batch_size: PositiveInt
    train_seq_len: PositiveInt = 1024
    provenance: dict[str, Any] | None = None


def _tells_apart(entries: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(entries.get("fingerprint"), str):
        raise ValueError("a fingerprint is needed")
    return entries


Text = Annotated[dict[str, Any], AfterValidator(_tells_apart)]  # what tells it from others


class Trained(_Record):
    """training_state.json, as far as weights go"""

    data: Text | None
    training_config: dict[str, Any]


class Export(Trained):
    """export.json"""

    weights: WeightsAre
    rounded: bool
    shared: dict[str, str]


class Memory(Export):
    """memory.json. `whole`: whether a base whose digest config.json has is all that the model holds besides."""

    whole: bool


def is_export(path: Path) -> bool:
    """Whether `export --to safetensors` wrote a folder: by its record, or by all its other files where that is gone."""
    others = (path / name for name in EXPORTED if name != EXPORT)
    return (path / EXPORT).is_file() or (
        all(file.is_file() for file in others) and is_ours(read_json(path / CONFIG))
    )


def adapted_base(path: Path) -> Path | None:
    """The folder whose weights a folder of PEFT adapts; None where it is none. ConfigError where it names no folder."""
    if not (path / ADAPTER_CONFIG).is_file():
        return None
    named = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not named or not Path(named).is_dir():
        raise ConfigError(
            f"{path / ADAPTER_CONFIG}: base_model_name_or_path is {named!r}, and there is no such folder. Put the "
            f"weights that were adapted there, or write their folder into it"
        )
    return Path(named)


def lacking(path: Path, files: Sequence[str] = EXPORTED) -> str:
    """Which of `files` a folder lacks, "" for none."""
    missing = [name for name in files if not (path / name).is_file()]
    return f"it lacks {', '.join(missing)}" if missing else ""


def is_ours(entries: dict[str, Any]) -> bool:
    """Whether a config.json is one that this trainer writes, be it damaged."""
    return {"type", "model_cfg"} <= entries.keys() and "model_type" not in entries


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ConfigError if the file holds none."""
    require_file(path, str(path))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: a JSON object is needed, got a {type(found).__name__}")
    return found


def read_record(path: Path, kind: type[BaseModel]) -> dict[str, Any]:
    """The entries of such a file. ConfigError names those that are not as they were written."""
    entries = read_json(path)
    try:
        kind.model_validate(entries)
    except ValidationError as error:
        raise ConfigError(f"{path} is not as this trainer writes it: {'; '.join(told(error))}") from None
    return entries


def told(error: ValidationError) -> list[str]:
    """Each entry, what is wrong with it, and what it says."""
    return [
        f"{'.'.join(map(str, e['loc']))}: {e['msg']}"
        + ("" if e["type"] == "missing" else f", got {shorten_text(repr(e['input']))}")
        for e in error.errors()
    ]
