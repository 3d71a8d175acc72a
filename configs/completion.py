"""Words that a shell may complete, for `--shell-completion query=<shell>`. Hydra's own scripts ask for them."""

from __future__ import annotations

import glob
import os
import typing
from collections.abc import Iterator

from configs.compose import prepare
from configs.files import FORMATS, choices, options
from configs.frontend import COMMANDS, GROUPS, MODEL_FLAGS
from configs.grammar import field_types
from configs.hydra_app import compose_unresolved
from configs.hydra_words import FLAGS
from configs.messages import ConfigError
from configs.schema import CHOICES, GENERIC_FIELDS, PATHS
from naming import not_one_of

ASKED = ("install", "uninstall", "query")
SHELLS = ("bash", "fish", "zsh")
_MODEL_WORDS = {"model", "hydra_model_cfg", *(f"--{flag}" for flag in MODEL_FLAGS)}


def asked_of(words: list[str]) -> tuple[str, str]:
    """(what, shell) of `--shell-completion <what>=<shell>`. ConfigError for anything else."""
    what, _, shell = words[0].partition("=") if len(words) == 1 else ("", "", "")
    if what not in ASKED:
        raise ConfigError(
            "command line: --shell-completion takes install=<shell>, uninstall=<shell> or query=<shell>"
        )
    if shell not in SHELLS:
        raise ConfigError(f"command line: --shell-completion: {what}: {not_one_of(shell, SHELLS)}")
    return what, shell


def complete(line: str) -> list[str]:
    """What the last word of a command line may become, sorted."""
    words = line.split()
    start = next((i for i, word in enumerate(words) if word.endswith("mytrainer.py")), 0) + 1
    last = "" if line.endswith(" ") or len(words) <= start else words.pop()
    given = words[start:]
    if given and given[-1] in _MODEL_WORDS:
        return sorted(w for w in _models(last) if w.startswith(last))
    key, equals, value = last.partition("=")
    found = (f"{key}={v}" for v in _values(key, value)) if equals else _names(last, given)
    return sorted({word for word in found if word.startswith(last)})


def _models(begun: str) -> list[str]:
    return [*options(), *(f for f in _files(begun) if f.endswith(("/", *FORMATS)))]


def _files(begun: str) -> list[str]:
    """Paths that begin so, those of folders with a slash behind."""
    return [f"{path}/" if os.path.isdir(path) else path for path in glob.glob(f"{glob.escape(begun)}*")]


def _values(key: str, begun: str) -> list[str]:
    """What may stand behind `key=`."""
    name = key.lstrip("-+").replace("-", "_")
    if key in _MODEL_WORDS:
        return _models(begun)
    if name in (*GROUPS, *CHOICES):
        return choices(name) if name in GROUPS else list(CHOICES[name].table)
    if name in PATHS:
        return _files(begun)
    if name not in GENERIC_FIELDS:
        return []
    kinds = field_types(name)
    literals = [v for kind in kinds for v in typing.get_args(kind)]
    return [*("true", "false") * (bool in kinds), *map(str, literals), *["null"] * (type(None) in kinds)]


def _names(begun: str, given: list[str]) -> Iterator[str]:
    """Words without a value yet."""
    if not given:
        yield from COMMANDS
    yield from (flag for flag in FLAGS if flag.startswith("--"))
    yield from ("--hydra_model_cfg=", "model=", "model_cfg.", *(f"{name}=" for name in GENERIC_FIELDS))
    if begun.startswith("model_cfg."):
        try:
            tree = compose_unresolved(prepare([w for w in given if w not in FLAGS]).overrides)
        except ConfigError:
            return  # what is typed so far says no model
        yield from (f"model_cfg.{name}=" for name in tree.get("model_cfg") or {})
