"""Weights that a run begins from, as far as they decide its configuration (a folder of Hugging Face transformers, and
one of `export`, says which architecture it holds, and its sizes), and what is said of a path that holds none."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.files import CONFIGS, Node, shown
from configs.grammar import override_choices, parse_override
from configs.messages import ConfigError
from configs.request import Request
from configs.runs import OUTPUTS, RUNS, Fixed, checkpoints, fix, run_meant, saved_architecture
from configs.saved import (
    ADAPTER_CONFIG,
    EXPORT,
    MEMORY,
    Architecture,
    adapted_base,
    is_export,
    lacking,
    read_record,
)
from models import ARCHITECTURES, alias
from naming import expand_path

FIELD = "init_from_checkpoint"
# By which a run, a checkpoint, what `export` writes and a folder of PEFT are known.
_KNOWN_BY = ("config.yaml", "training_state.json", EXPORT, MEMORY, ADAPTER_CONFIG)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def nothing_at(path: Path) -> str:
    """What is said of a path where nothing is, with the folders that are there."""
    near = sorted(p.name for p in path.parent.glob("*") if p.is_dir() and not p.name.startswith("."))[:8]
    there = f" In {path.parent}: {', '.join(near)}." if near else ""
    return f"no such checkpoint or run folder: {path}.{there}"


def not_weights(path: Path) -> str:
    """Why there can be no weights at a path, "" where there may be."""
    if not path.exists():
        return nothing_at(path) + _of_the_hub(str(path))
    if path.is_file():
        what = "a file of weights" if path.suffix in _WEIGHTS else "a file"
        return f"{path} is {what}, and the folder that it lies in is needed: {path.parent}"
    if (
        (path / "config.json").is_file()
        or any((path / name).is_file() for name in _KNOWN_BY)
        or checkpoints(path)
    ):
        return ""
    return (
        f"{path} holds no weights that are read: neither a run of ours (config.yaml, checkpoint-<step>/) or a "
        f"checkpoint of one, nor what export writes (config.json, model.safetensors, export.json), nor a folder of "
        f"Hugging Face transformers (config.json with a model_type, model.safetensors, tokenizer.json)"
    )


def _of_the_hub(name: str) -> str:
    """How to have a model whose name on Hugging Face this may be."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or Path(name).parent in (RUNS, OUTPUTS):
        return ""
    return f" If that is a name on Hugging Face: hf download {name} --local-dir DIR, then give DIR"


@dataclass(frozen=True)
class Sizes:
    """What the config.json of such a folder says. `fields`: those of `model_cfg` that it decides; `row`: tokens of
    a row in training, where that was here. `name` is the architecture's in messages."""

    path: Path
    type: str
    name: str
    fields: dict[str, Any]
    row: int | None = None

    @property
    def source(self) -> Path:
        return self.path / "config.json"


def sizes_at(given: Any) -> Sizes | None:
    """The sizes that a value of `init_from_checkpoint` brings, None for a run or checkpoint, which brings none.
    ConfigError says why its folder cannot be used."""
    from models.huggingface.folder import read_folder

    if not isinstance(given, str) or not given:
        return None
    path = _path(given)
    if is_export(path):
        if problem := lacking(path):
            raise ConfigError(f"{FIELD}: {path} is damaged: {problem}. Export it again")
        saved = read_record(path / "config.json", Architecture)
        return Sizes(path, saved["type"], saved["type"], saved["model_cfg"], saved.get("train_seq_len", 1024))
    folder = read_folder(adapted_base(path) or path)
    return Sizes(path, folder.row.type, folder.row.name, folder.fields) if folder else None


def _path(given: str) -> Path:
    try:
        return expand_path(given)
    except ValueError as error:
        raise ConfigError(f"{FIELD}: {error}") from None


def sizes_given(request: Request, nodes: list[Node]) -> list[Sizes]:
    """Those that the runs of a command line begin with, as far as they are of the architecture."""
    types = {request.values.get("type") or node.stated("type") or node.path.stem for node in nodes}
    stated = [node.stated(FIELD) for node in nodes] if FIELD not in request.keys else _given(request)
    if not any(stated) or all(on_a_base(type_, None) for type_ in types):
        return []
    return [sizes for given in stated if (sizes := sizes_at(given)) is not None and sizes.type in types]


def _given(request: Request) -> list[Any]:
    """The values on the command line, several in a sweep."""
    if FIELD in request.sweeps:
        return override_choices(parse_override(f"{FIELD}={request.written(FIELD)}"), [])
    return [request.values[FIELD]] if request.values.get(FIELD) else []


def implied_model(request: Request) -> str | None:
    """The model file of a command that names such a folder and no file: the architecture's own."""
    given = _given(request)
    if problems := [p for value in given if (p := not_weights(_path(str(value))))]:
        raise ConfigError([f"command line: {FIELD}: {problem}" for problem in problems])
    types = {s.type for value in given if (s := sizes_at(value)) is not None and s.type in ARCHITECTURES}
    if len(types) > 1:
        files = " or ".join(shown(CONFIGS / f"{type_}.yaml") for type_ in sorted(types))
        raise ConfigError(f"command line: {FIELD}: no model chosen, and the folders differ. Give {files}")
    if types:
        return str(CONFIGS / f"{types.pop()}.yaml")
    run = run_meant(request)
    if given and not (run and (run / "config.yaml").is_file()):  # a run that is gone on with has its own
        raise ConfigError([f"command line: {FIELD}: {_no_model(_path(str(value)))}" for value in given])
    return None


def _no_model(path: Path) -> str:
    """Why no model file follows from weights that were trained here, and what to give."""
    saved, _ = saved_architecture({"resume": str(path)}, None) or ({}, path)
    known = str(saved.get("type")) in ARCHITECTURES
    file = shown(CONFIGS / f"{saved['type']}.yaml") if known else "<model file>"
    what = f"type {saved['type']}" if saved else "a run"
    return (
        f"{path} holds weights of {what}, and no model is chosen for them. Give the model file, with the sizes, that "
        f"they were trained with: --hydra_model_cfg={file}"
    )


def take_sizes(
    tree: dict[str, Any],
    explicit: set[str],
    notices: list[str],
    where: Callable[[str], str] = lambda key: "",
) -> Callable[[str], str]:
    """Put the sizes of the weights into the tree of a run that begins from such a folder. Gives `where`, which knows
    them. ConfigError for another architecture, and for what the command line says otherwise."""
    if tree.get(FIELD) and on_a_base(tree.get("type"), tree.get("model_adapter")):
        return where
    sizes = sizes_at(tree.get(FIELD))
    if sizes is None or not isinstance(tree.get("model_cfg"), dict):  # what is none, the typed check refuses
        return where
    if sizes.row is not None:
        fields = _of_exported(tree, sizes, explicit, where)
    elif tree.get("type") == sizes.type:
        fields = sizes.fields
    else:
        raise ConfigError(
            f"{FIELD}: {sizes.path} holds a {sizes.name}, type {sizes.type}, and this run is type {tree.get('type')}. "
            f"Give --hydra_model_cfg={shown(CONFIGS / f'{sizes.type}.yaml')}, or leave the model file out"
        )
    if fields:
        lock = f"the sizes of {sizes.path} are fixed by {sizes.source}"
        told = _take_row(tree, sizes, explicit)
        fix(tree, Fixed(sizes.type, fields, sizes.source, lock), explicit, notices, *told)
    decided = {f"model_cfg.{name}" for name in fields}
    return lambda key: str(sizes.source) if key in decided else where(key)


def on_a_base(type_: Any, adapter: str | None) -> bool:
    """Whether another model decides the sizes, so that adapters alone can be taken of a folder."""
    from configs.validate import architecture_config

    name, _ = alias(type_) or (type_, {})
    return name in ARCHITECTURES and bool(architecture_config(name, adapter, lambda key: "").elsewhere)


def _take_row(tree: dict[str, Any], sizes: Sizes, explicit: set[str]) -> list[str]:
    """Have rows as long as they were in training, or no longer than the context, unless the command line says how long.
    Gives what is told of it."""
    asked = tree.get("train_seq_len")
    if "train_seq_len" in explicit or not isinstance(asked, int):
        return []
    row = tree["train_seq_len"] = sizes.row or min(asked, sizes.fields.get("n_ctx", asked))
    return [f"train_seq_len {row} (not {asked})"] if row != asked else []


def _of_exported(
    tree: dict[str, Any], sizes: Sizes, explicit: set[str], where: Callable[[str], str]
) -> dict[str, Any]:
    """The fields to take of weights that were trained here. Other things can be made of those, by an objective that
    differs or an architecture with the same backbone: the command line's word holds, and it is seen whether they
    fit."""
    from configs.validate import architecture_config

    if tree.get("type") != sizes.type:
        return {}
    free = architecture_config(sizes.type, tree.get("model_adapter"), where).free()
    return {k: v for k, v in sizes.fields.items() if k not in free and f"model_cfg.{k}" not in explicit}
