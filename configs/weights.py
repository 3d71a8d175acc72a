"""Weights that a run begins from, as far as they decide its configuration (a folder of Hugging Face transformers says
which architecture it holds, and its sizes), and what is said of a path that holds none."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.files import CONFIGS, Node, shown
from configs.grammar import override_choices, parse_override
from configs.messages import ConfigError
from configs.request import Request
from configs.runs import Fixed, checkpoints, fix

if TYPE_CHECKING:
    from models.huggingface.folder import Folder

FIELD = "init_from_checkpoint"
_OURS = ("config.yaml", "training_state.json")  # by which a run or a checkpoint of one is known
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def not_weights(path: Path) -> str:
    """Why there can be no weights at a path, "" where there may be."""
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*") if p.is_dir() and not p.name.startswith("."))[:8]
        there = f" In {path.parent}: {', '.join(near)}." if near else ""
        return f"no such checkpoint or run folder: {path}.{there}{_of_the_hub(str(path))}"
    if path.is_file():
        what = "a file of weights" if path.suffix in _WEIGHTS else "a file"
        return f"{path} is {what}, and the folder that it lies in is needed: {path.parent}"
    if (
        (path / "config.json").is_file()
        or any((path / name).is_file() for name in _OURS)
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
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return ""
    return f" If that is a name on Hugging Face: hf download {name} --local-dir DIR, then give DIR"


def folder_at(given: Any) -> Folder | None:
    """The folder of transformers that a value of `init_from_checkpoint` names, None for anything else. ConfigError says
    why it cannot be used."""
    from models.huggingface.folder import read_folder

    return read_folder(Path(os.path.expanduser(given))) if isinstance(given, str) and given else None


def folders(request: Request, nodes: list[Node]) -> list[Folder]:
    """Those that the runs of a command line begin from."""
    stated = [node.stated(FIELD) for node in nodes] if FIELD not in request.keys else _given(request)
    return [folder for given in stated if (folder := folder_at(given)) is not None]


def _given(request: Request) -> list[Any]:
    """The values on the command line, several in a sweep."""
    if FIELD in request.sweeps:
        return override_choices(parse_override(f"{FIELD}={request.written(FIELD)}"), [])
    return [request.values[FIELD]] if request.values.get(FIELD) else []


def implied_model(request: Request) -> str | None:
    """The model file of a command that names such a folder and no file: the architecture's own."""
    given = _given(request)
    if problems := [p for value in given if (p := not_weights(Path(os.path.expanduser(str(value)))))]:
        raise ConfigError([f"command line: {FIELD}: {problem}" for problem in problems])
    types = {folder.row.type for value in given if (folder := folder_at(value)) is not None}
    if len(types) > 1:
        files = " or ".join(shown(CONFIGS / f"{type_}.yaml") for type_ in sorted(types))
        raise ConfigError(f"command line: {FIELD}: no model chosen, and the folders differ. Give {files}")
    return str(CONFIGS / f"{types.pop()}.yaml") if types else None


def take_sizes(
    tree: dict[str, Any],
    explicit: set[str],
    notices: list[str],
    where: Callable[[str], str] = lambda key: "",
) -> Callable[[str], str]:
    """Put the sizes of the weights into the tree of a run that begins from such a folder. Gives `where`, which knows
    them. ConfigError for another architecture, and for what the command line says otherwise."""
    folder = folder_at(tree.get(FIELD))
    if folder is None or not isinstance(
        tree.get("model_cfg"), dict
    ):  # the second is for the typed check to refuse
        return where
    source, type_ = folder.path / "config.json", folder.row.type
    if tree.get("type") != type_:
        raise ConfigError(
            f"{FIELD}: {folder.path} holds a {folder.row.name}, type {type_}, and this run is type {tree.get('type')}. "
            f"Give --hydra_model_cfg={shown(CONFIGS / f'{type_}.yaml')}, or leave the model file out"
        )
    fix(
        tree,
        Fixed(type_, folder.fields, source, f"the sizes of {folder.path} are fixed by {source}"),
        explicit,
        notices,
    )
    decided = {f"model_cfg.{name}" for name in folder.fields}
    return lambda key: str(source) if key in decided else where(key)
