"""A flat JSON object with the sizes of a GPT: as a model file a `gpt2` of these sizes, as a preset those of any type.

Keys are turned one by one, nothing is computed from two of them: `n_layer` is `n_layers`, `n_embd` `d_model`, `n_head`
`n_heads`, `block_size` the context and the length of rows, `batch_size` the rows of a step (`global_batch_size`).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from configs.formats.text import read_text
from configs.messages import ConfigError
from naming import did_you_mean

ARCHITECTURE = "gpt2"  # the type that a file means
DEFAULTS = {"batch_size": 32, "vocab_size": 50304}  # of files without them, which are told so
# Key of a file -> (its type, our fields).
FIELDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "n_layer": (int, ("model_cfg.n_layers",)),
    "n_embd": (int, ("model_cfg.d_model",)),
    "n_head": (int, ("model_cfg.n_heads",)),
    "block_size": (int, ("model_cfg.n_ctx", "train_seq_len")),
    "vocab_size": (int, ("model_cfg.vocab_size",)),
    "dropout": (float, ("model_cfg.dropout",)),
    "bias": (bool, ("model_cfg.bias",)),
    "batch_size": (int, ("global_batch_size",)),
    "device": (str, ("device",)),
    "name": (str, ()),
    "description": (str, ()),
}
REQUIRED = ("block_size", "n_embd", "n_head", "n_layer", "dropout", "bias")


def load(path: Path, where: str) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Values in our names, the lines that they come from (dotted key -> line), and remarks. `where`: the path as
    people know it. Raises ConfigError with all problems of the file."""
    stated, places = _parse(path, where)
    problems = [p for key, value in stated.items() for p in _problems(key, value, f"{where}:{places[key]}")]
    problems += [f"{where}: required key '{key}' has no value" for key in REQUIRED if key not in stated]
    if problems:
        raise ConfigError(problems)
    told = ", ".join(stated[key] for key in ("name", "description") if key in stated)
    notices = [f"{where}: {told}"] if told else []
    notices += [f"{where}: {key} not given: {value}" for key, value in DEFAULTS.items() if key not in stated]
    # Those of the type's own file are of its own batch size.
    values: dict[str, Any] = {"type": ARCHITECTURE, "model_cfg": {}, "batch_stages": None}
    lines: dict[str, int] = {}
    for key, value in (DEFAULTS | stated).items():
        for field in FIELDS[key][1]:
            root, _, leaf = field.rpartition(".")
            (values[root] if root else values)[leaf] = value
            lines[field] = places.get(key, 1)
    return values, lines, notices


def description(path: Path) -> str:
    """What a file says that it is, "" where it says nothing; what is wrong with it is said where it is read."""
    try:
        stated = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(stated.get("description", "")) if isinstance(stated, dict) else ""


def _parse(path: Path, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The object of a file, and the line of each key."""
    text = read_text(path, where)
    places: dict[str, list[int]] = {}
    for found in re.finditer(r'(?<!\\)"(\w+)"\s*:', text):
        places.setdefault(found[1], []).append(text.count("\n", 0, found.start()) + 1)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                first, second = [*places.get(name, []), 1, 1][:2]
                raise ConfigError(f"{where}:{second}: '{name}' was already set on line {first}")
        return dict(pairs)

    try:
        stated = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}:{error.lineno}: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: cannot be read: {error}") from None
    if not isinstance(stated, dict):
        raise ConfigError(
            f"{where}:1: a preset is one object of keys and values, got {type(stated).__name__}"
        )
    return stated, {key: places.get(key, [1])[0] for key in stated}


def _problems(key: str, value: Any, where: str) -> list[str]:
    """What is wrong with one entry; relations between fields are the architecture's own to check."""
    if key not in FIELDS:
        return [f"{where}: unknown key '{key}'.{did_you_mean(key, FIELDS)} Known: {', '.join(FIELDS)}"]
    kind = FIELDS[key][0]
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        return [f"{where}: {key}: expected {kind.__name__}, got {json.dumps(value)} ({type(value).__name__})"]
    if kind is float and not math.isfinite(value):
        return [f"{where}: {key}: expected a finite number, got {value}"]
    if kind is int and value < 1:
        return [f"{where}: {key}: must satisfy {key} >= 1, got {value}. Nearest: 1"]
    return []
