"""A sweep as a whole: jobs that run side by side on one machine, and the command of a sweep that exists already.

`resume=<sweep folder> -m` repeats the command that the folder's multirun.yaml records, in the place where it was given;
further words of the command line are put behind it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from configs import trust
from configs.frontend import parse
from configs.grammar import word
from configs.hardware import uses_cuda
from configs.messages import REDACTED, ConfigError
from configs.request import Request
from configs.strangers import harmless

MULTIRUN = "multirun.yaml"
CALLBACK = "sweep"  # among hydra.callbacks: what is told to every job, and recorded


def side_by_side(launcher: Mapping[str, Any]) -> bool:
    """Whether a launcher of Hydra may run several jobs at once on this machine."""
    name = str(launcher.get("_target_", "")).rpartition(".")[2]
    return name == "LocalLauncher" or (name == "JoblibLauncher" and launcher.get("n_jobs") != 1)


def on_one_gpu(tree: dict[str, Any], launcher: Mapping[str, Any]) -> None:
    """A job beside others has one GPU to itself, unless it asks for more."""
    device = str(tree.get("device", "auto"))
    if tree.get("num_gpus") == "auto" and side_by_side(launcher) and uses_cuda(device):
        tree["num_gpus"] = 1


def recorded_words(request: Request, secrets: Mapping[str, str]) -> dict[str, list[str]]:
    """The command as Hydra's settings keep it: `models` and the other `words`, without secrets. An option and its value
    are one word, so that one of the same name takes the place of both."""
    words = ["=".join(given) for given in request.words if _key(given[0]) != trust.WORD]
    for secret in sorted(secrets.values(), key=len, reverse=True):
        words = [text.replace(secret, REDACTED) for text in words]
    return {"models": [_plain(text) for text in request.models], "words": [_plain(text) for text in words]}


def _plain(text: str) -> str:
    """So that OmegaConf does not look for what `${...}` in it refers to."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)


def repeated(argv: list[str]) -> tuple[list[str], Path] | None:
    """The words of `resume=<sweep folder> -m ...` with those of the sweep before them, and its folder; None for every
    other command. ConfigError where the folder says nothing of a command. Their paths mean what they meant then:
    `working_folder`."""
    asked = parse(argv)
    folder = Path(str(asked.values.get("resume") or "none"))
    if not asked.multirun or folder.name in ("none", "auto"):
        return None
    record = folder / MULTIRUN
    if not record.is_file():
        raise ConfigError(
            f"command line: resume: {folder} holds no sweep to go on with (no {MULTIRUN}). A single run is "
            "gone on with without -m"
        )
    told = _told(record)
    folder = Path(os.path.abspath(folder))
    words = [text for given in asked.words if _key(given[0]) != "resume" for text in given]
    words.append(word("hydra.sweep.dir", folder))
    models = asked.models or told["models"]
    said = {_key(text) for text in words}
    old = [text for text in told["words"] if _key(text) not in {*said, trust.WORD}]
    if variables := [text for text in old if _sets_variable(text)]:
        raise ConfigError(
            f"{record}: the command of this sweep sets {', '.join(variables)} in the environment, and may "
            f"be a stranger's. If you mean it, give it again"
        )
    return [*(f"--hydra_model_cfg={m}" for m in models), *old, *words], folder


def _key(text: str) -> str:
    """The key of `key=value`, the whole of another word."""
    return text.lstrip("-+").partition("=")[0] if "=" in text or text.startswith("--") else text


def _sets_variable(text: str) -> bool:
    """Whether a word of a record sets a variable that is not harmless; what is redacted is asked for anyway."""
    key, _, value = text.lstrip("-+").partition("=")
    field, _, name = key.partition(".")
    return field == "env" and not harmless(name) and REDACTED not in value


def _told(record: Path) -> dict[str, list[str]]:
    """What a multirun.yaml says of its command."""
    try:
        tree = yaml.safe_load(record.read_text(encoding="utf-8"))
        told = OmegaConf.to_container(OmegaConf.create(tree["hydra"]["callbacks"][CALLBACK]), resolve=True)
        assert isinstance(told, dict)
        return {name: [str(text) for text in told[name]] for name in ("models", "words")}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{record}: says nothing of the command of its sweep ({error})") from None


def working_folder(sweep: Path) -> Path:
    """Where the command of a sweep was given."""
    tree = yaml.safe_load((sweep / MULTIRUN).read_text(encoding="utf-8"))
    return Path(str(tree["hydra"]["runtime"]["cwd"]))
