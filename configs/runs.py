"""Runs that exist already: which folder a command means, its saved config, the lock on its architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.files import shown
from configs.grammar import in_quotes
from configs.messages import ConfigError, differences
from configs.removed import REMOVED, YOUNGER
from configs.request import Request
from naming import did_you_mean, shorten_text

RUNS = Path("checkpoints")  # of runs with a name
OUTPUTS = Path("outputs")  # of those without


def folder_of_path(path: str | Path) -> Path:
    """The run folder of `resume=<path>`, where the path is that folder or one of its checkpoints."""
    path = Path(path)
    inside = re.fullmatch(r"checkpoint-\d+|best_model|final_model", path.name)
    return path.parent if inside else path


def named_folder(values: Mapping[str, Any], explicit: set[str] = frozenset()) -> Path | None:  # type: ignore[assignment]
    """The run folder that the settings name, `None` if they leave it to the clock.

    What stands on the command line (`explicit`) comes first: `output_dir=new resume=old/checkpoint-100`
    branches off, `resume=old` alone goes on in `old` whatever the files say.
    """
    resume = values.get("resume")
    said_here = {"output_dir", "model_name"} & explicit
    if resume not in (None, "none", "auto", "???") and not said_here:
        return folder_of_path(resume)
    if values.get("output_dir") and said_here != {"model_name"}:
        return Path(values["output_dir"])
    return RUNS / str(values["model_name"]) if values.get("model_name") else None


def checkpoints(folder: Path) -> list[Path]:
    """`checkpoint-<step>` folders, oldest first."""
    found = (p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir())
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def run_meant(request: Request) -> Path | None:
    """The folder of the run that a command line names."""
    resume = _resumed(request)
    return folder_of_path(resume) if resume else named_folder(request.values, request.keys)


def _resumed(request: Request) -> str:
    """The path of `resume=<path>`, "" where none is given."""
    resume = str(request.values.get("resume") or "none")
    return "" if resume in ("none", "auto") else resume


def implied_model(request: Request) -> str | None:
    """The model file of a command that names a run instead of one: the run's own config.yaml.

    `--model_name X` also goes on with that run if it has checkpoints; the override is added to the request, and what
    the run did where it knew no such field.
    """
    folder = run_meant(request)
    if folder is None:
        return None
    if (resume := _resumed(request)) and Path(resume).is_file():
        raise ConfigError(f"command line: {not_a_folder(resume)}")
    config = folder / "config.yaml"
    if not config.is_file():
        raise ConfigError(_no_such_run(folder, request))
    if "resume" not in request.keys and checkpoints(folder):
        request.overrides.append("resume=auto")
        request.values["resume"] = "auto"
    said = config.read_text(encoding="utf-8", errors="replace")
    for name, before in YOUNGER.items():
        if name not in request.keys and not re.search(rf"^{name}:", said, re.MULTILINE):
            request.overrides.append(f"{name}={before}")
            request.values[name] = before
    request.implied = config.resolve()
    return str(config.absolute())


def how_without_its_file(folder: Path) -> str:
    """How to go on with a run whose config.yaml cannot be read, to stand behind what is wrong with it. "" where there
    is nothing to go on with."""
    if not checkpoints(folder):
        return ""
    go_on = in_quotes("resume", folder)
    return (
        f". The checkpoints of the run are there, and know its architecture: give it the model file that it was begun "
        f"with, --hydra_model_cfg=FILE {go_on}, and what the command line set then"
    )


def not_a_folder(resume: str) -> str:
    """The message for `resume=run/model.pt`."""
    parent = folder_of_path(Path(resume).parent)
    hint = f" Go on with its run: {in_quotes('resume', parent)}" if (parent / "config.yaml").is_file() else ""
    return f"resume: {resume} is a file; a run folder or a checkpoint-<step> in one is needed.{hint}"


def _no_such_run(folder: Path, request: Request) -> str:
    known = sorted(p.parent.name for p in RUNS.glob("*/config.yaml"))
    if request.values.get("model_name") and not {"output_dir", "resume"} & request.values.keys():
        name = str(request.values["model_name"])
        runs = f" Runs: {', '.join(known)}." if known else ""
        return (
            f"command line: no run called '{name}' ({shown(folder.absolute())} has no config.yaml)."
            f"{did_you_mean(name, known)}{runs} To start it, add --hydra_model_cfg=configs/<name>.yaml"
        )
    if begun := how_without_its_file(folder):
        return f"command line: {shown(folder.absolute())} holds no config.yaml that is a file{begun}"
    begin = ""
    if (folder / "config.json").is_file():  # of a model, though of no run
        begin = f", or begin one from the weights there: {in_quotes('init_from_checkpoint', folder)}"
    return (
        f"command line: {folder} holds no run to go on with (no config.yaml). "
        f"To start one, add --hydra_model_cfg=configs/<name>.yaml{begin}"
    )


def saved_architecture(values: Mapping[str, Any], folder: Path | None) -> tuple[dict[str, Any], Path] | None:
    """(contents, path) of the config.json that fixes the architecture of a run that goes on, if any."""
    resume = values.get("resume")
    if resume in (None, "none"):
        return None
    source = folder if resume == "auto" else Path(str(resume))
    if source is None:
        return None
    run = folder_of_path(source)
    for candidate in (
        source / "config.json",
        run / "config.json",
        *(c / "config.json" for c in checkpoints(run)[::-1]),
    ):
        if not candidate.is_file():  # a FIFO would be waited for
            continue
        try:
            saved = json.loads(candidate.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(saved, dict) and {"format", "type", "model_cfg"} <= saved.keys():
            _refuse_damaged(saved, candidate)
            return saved, candidate
    return None


_SAVED = {
    "type": str,
    "model_cfg": dict,
    "model_adapter": str | None,
    "train_seq_len": int,
    "preset": str | None,
}


def _refuse_damaged(saved: Mapping[str, Any], source: Path) -> None:
    """ConfigError where an entry of config.json is none that was written there."""
    wrong = [name for name, kind in _SAVED.items() if name in saved and not isinstance(saved[name], kind)]
    if wrong:
        told = ", ".join(f"{name} is {shorten_text(repr(saved[name]))}" for name in wrong)
        raise ConfigError(
            f"{source} is not as this trainer writes it: {told}. Name another checkpoint of the run"
        )


@dataclass(frozen=True)
class Fixed:
    """An architecture that is decided elsewhere: by the run that goes on, or by the weights that one begins from.
    `source` is the file that says so, `lock` a sentence on it."""

    type: str
    model_cfg: Mapping[str, Any]
    source: Path
    lock: str


def fix(tree: dict[str, Any], fixed: Fixed, explicit: set[str], notices: list[str], *others: str) -> None:
    """Put an architecture into the tree. What the user asked for differently on the command line is an error; what a
    model file or preset says differently is replaced, with a notice, which tells `others` too."""
    asked = tree.get("model_cfg") or {}
    differing = [k for k in differences(asked, fixed.model_cfg) if f"model_cfg.{k}" not in REMOVED]
    problems = [
        f"command line: {fixed.lock}: {k} is {fixed.model_cfg[k]}, {asked[k]} was asked"
        for k in differing
        if f"model_cfg.{k}" in explicit
    ]
    if tree.get("type") != fixed.type and "type" in explicit:
        problems.append(f"command line: {fixed.lock}: type is {fixed.type}, {tree.get('type')} was asked")
    if problems:
        raise ConfigError(problems)
    # null means what follows from other fields, or from the tokenizer: nothing else was asked for.
    told = [f"{k} {fixed.model_cfg[k]} (not {asked[k]})" for k in differing if asked[k] is not None]
    if tree.get("type") not in (fixed.type, None, "???"):
        told.insert(0, f"type {fixed.type} (not {tree['type']})")
    if told := [*told, *others]:
        notices.append(f"the architecture is that of {fixed.source}: {', '.join(told)}")
    tree["model_cfg"] = {**asked, **fixed.model_cfg}
    tree["type"] = fixed.type


def apply_lock(
    tree: dict[str, Any],
    saved: Mapping[str, Any],
    source: Path,
    explicit: set[str],
    notices: list[str],
    free: set[str],
) -> None:
    """Put the architecture of the run that goes on into the tree, see `fix`. `free` fields of `model_cfg` are no
    architecture: they stay as they are in the tree."""
    asked = tree.get("model_cfg") or {}
    fields = {k: v for k, v in saved["model_cfg"].items() if k not in free or k not in asked}
    # What a row is belongs to the run; only the command line may change it on the way.
    kept = {k: saved[k] for k in ("train_seq_len", "preset") if k in saved and k not in explicit}
    told = [
        f"{k} {v} (not {tree.get(k)})" for k, v in kept.items() if k == "train_seq_len" and tree.get(k) != v
    ]
    lock = f"the architecture of '{folder_of_path(source.parent)}' is fixed by {source}"
    fix(tree, Fixed(saved["type"], fields, source, lock), explicit, notices, *told)
    tree.update(kept)
    # A field that the saved model does not know is dropped if a file brought it; one from the command line
    # stays, for the typed check to refuse.
    known = {k for k in asked if k in free or f"model_cfg.{k}" in explicit} | fields.keys()
    tree["model_cfg"] = {k: v for k, v in tree["model_cfg"].items() if k in known}
    if saved.get("model_adapter") is not None:
        tree["model_adapter"] = saved["model_adapter"]


def refuse_overwrite(values: Mapping[str, Any], folder: Path | None) -> None:
    """A folder with checkpoints is gone on with, or left alone."""
    if folder is None or values.get("resume") not in (None, "none") or values.get("eval_only"):
        return
    existing = checkpoints(folder)
    if existing:
        raise ConfigError(
            f"{folder} already holds {existing[-1].name}. Add resume=auto to go on with it, "
            "or choose another model_name or output_dir"
        )
