"""The command line in our own spelling, turned into Hydra's.

Hydra's parser knows neither `--hydra_model_cfg` nor `--learning_rate 3e-4` nor `preset=tiny`. `parse`
sorts the words of a command line into model files, flags of Hydra and overrides; nothing is read from
disk here except the folder listing of `configs/`. Problems are collected, not raised one by one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException

from configs.files import EXTENSIONS, check_option, choices
from configs.messages import (
    ARCHITECTURE_ALIASES,
    RENAMED,
    ConfigError,
    suggest_key,
)
from configs.removed import REMOVED
from configs.schema import GENERIC_FIELDS, RunConfig
from configs.unread import overruled
from naming import did_you_mean, not_one_of

MODEL_FLAGS = ("hydra_model_cfg", "model", "config", "config-name", "cn")
GROUPS = ("preset", "data")
SIZE_KEYS = ("n_layers", "d_model", "n_heads", "n_kv_heads", "ffn_hidden", "n_ctx")
ARCHITECTURE_WORDS = {
    "vocab_size",
    "n_ctx",
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "dropout",
    "bias",
}
_ARCHITECTURE_PATHS = [f"model_cfg.{w}" for w in sorted(ARCHITECTURE_WORDS)]
PLUGINS = {
    ("launcher", "submitit_slurm"): ("hydra-submitit-launcher", "slurm"),
    ("launcher", "submitit_local"): ("hydra-submitit-launcher", "slurm"),
    ("launcher", "joblib"): ("hydra-joblib-launcher", "joblib"),
    ("launcher", "ray"): ("hydra-ray-launcher", "ray"),
    ("launcher", "rq"): ("hydra-rq-launcher", "rq"),
    ("sweeper", "optuna"): ("hydra-optuna-sweeper", "optuna"),
    ("sweeper", "ax"): ("hydra-ax-sweeper", "ax"),
    ("sweeper", "nevergrad"): ("hydra-nevergrad-sweeper", "nevergrad"),
}
# Mappings whose keys are not generic fields: what may stand in them is checked later.
_OPEN = ("model_cfg", "env", "kernels")
# Hydra's flags: spelling -> (name, takes a value). None: the value may be left out.
_HYDRA = {
    "-m": ("--multirun", False),
    "--multirun": ("--multirun", False),
    "-r": ("--run", False),
    "--run": ("--run", False),
    "-h": ("--help", False),
    "--help": ("--help", False),
    "--hydra-help": ("--hydra-help", False),
    "--version": ("--version", False),
    "--resolve": ("--resolve", False),
    "-c": ("--cfg", True),
    "--cfg": ("--cfg", True),
    "-p": ("--package", True),
    "--package": ("--package", True),
    "-cd": ("--config-dir", True),
    "--config-dir": ("--config-dir", True),
    "-i": ("--info", None),
    "--info": ("--info", None),
    "-sc": ("--shell-completion", False),
    "--shell-completion": ("--shell-completion", False),
}
_CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}


@dataclasses.dataclass
class Request:
    """What a command line asks for."""

    models: list[str] = dataclasses.field(default_factory=list)  # values of --hydra_model_cfg, as given
    config_path: str | None = None  # Hydra's --config-path: the folder of --config-name
    flags: list[str] = dataclasses.field(default_factory=list)  # for Hydra
    overrides: list[str] = dataclasses.field(default_factory=list)  # Hydra's language
    values: dict[str, Any] = dataclasses.field(default_factory=dict)  # key -> value of every plain override
    keys: set[str] = dataclasses.field(default_factory=set)  # every key set on the command line
    sweeps: set[str] = dataclasses.field(default_factory=set)  # keys with more than one value
    problems: list[str] = dataclasses.field(default_factory=list)
    notices: list[str] = dataclasses.field(default_factory=list)

    @property
    def multirun(self) -> bool:
        return "--multirun" in self.flags

    @property
    def mode(self) -> str:
        """`run`, or what is only shown: `help`, `cfg`, `info`, or `hydra` (Hydra's own business)."""
        for flag, mode in (("--help", "help"), ("--cfg", "cfg"), ("--info", "info")):
            if any(f.split("=")[0] == flag for f in self.flags):
                return mode
        own = ("--hydra-help", "--version", "--shell-completion")
        return "hydra" if any(f in own for f in self.flags) else "run"

    @property
    def needs_no_model(self) -> bool:
        return (
            self.mode in ("help", "hydra")
            or {"--info=plugins", "--info=searchpath"} & set(self.flags) != set()
        )


def parse(argv: list[str]) -> Request:
    """Sort a command line. Never raises for a user's mistake: see `Request.problems`."""
    request = Request()
    words = list(argv)
    while words:
        word = words.pop(0)
        try:
            if word.startswith("-") and len(word) > 1 and not word[1].isdigit():
                _flag(request, word, words)
            elif "=" not in word and (word.startswith("~/") or not word.startswith("~")):
                _positional(request, word)
            else:
                _override(request, word)
        except ConfigError as error:
            request.problems += error.problems
    if not request.multirun:
        request.problems += [
            f"command line: {key} has several values for one run. Add -m to run them as a sweep"
            for key in sorted(request.sweeps)
        ]
    if request.multirun and request.mode in ("cfg", "info"):
        request.problems.append(
            f"command line: --{request.mode} shows one run, and -m starts several. Leave out -m, and give one "
            "model and one value of each field"
        )
    if request.mode == "run" and not request.multirun:
        request.notices += [
            f"{key} is for sweeps (-m): a single run does not read it"
            for key in request.values
            if key.startswith("hydra")
        ]
    if request.values.get("init_from_checkpoint") and request.values.get("resume") not in (None, "none"):
        request.problems.append(
            "command line: resume and init_from_checkpoint exclude each other: the first goes on with a run, the "
            "second begins one from weights alone. Leave one of them out"
        )
    both = {"batch_size", "gradient_accumulation_steps"}
    if both <= request.keys and not {"global_batch_size"} & request.keys:
        request.overrides.append("global_batch_size=null")  # the two asked for decide it
    request.overrides += [f"{winner}=null" for winner in overruled(request.keys)]
    return request


def _flag(request: Request, word: str, rest: list[str]) -> None:
    """One word that starts with a dash, taking its value from `rest` where it has one."""
    name, equals, value = word.partition("=")
    key = name.lstrip("-").replace("-", "_")
    if name in _HYDRA:
        flag, takes = _HYDRA[name]
        if takes and not equals:
            value = _next(name, rest)
        elif takes is None and not equals and rest and rest[0] in _CHOICES[flag]:
            value = rest.pop(0)
        if flag == "--info" and not value:
            value = "all"  # left out, Hydra would take the next word for it
        if value and value not in _CHOICES.get(flag, (value,)):
            raise ConfigError(f"command line: {flag}: {not_one_of(value, _CHOICES[flag])}")
        request.flags.append(f"{flag}={value}" if value else flag)
    elif name.lstrip("-") in MODEL_FLAGS or key in ("hydra_model_cfg", "config_name"):
        request.models.append(value if equals else _next(name, rest))
    elif name in ("--config-path", "-cp"):
        request.config_path = value if equals else _next(name, rest)
    else:
        _generic_flag(request, name, key, value if equals else None, rest)


def _generic_flag(request: Request, name: str, key: str, value: str | None, rest: list[str]) -> None:
    """`--key=value`, `--key value`, and `--key` alone for a field that is true or false."""
    field = RENAMED.get(key, key)
    if field not in GENERIC_FIELDS and field.split(".")[0] not in _OPEN:
        if field in REMOVED:
            raise ConfigError(unknown_key(field))
        hint = suggest_key(key, (*GENERIC_FIELDS, "hydra_model_cfg"), _ARCHITECTURE_PATHS)
        hint = hint.replace(" '", " '--")
        if value is None and rest and not rest[0].startswith("-") and "=" not in rest[0]:
            rest.pop(0)  # its value: one problem, not two
        raise ConfigError(f"command line: unknown option {name}.{hint}")
    if value is None:
        is_switch = field in GENERIC_FIELDS and bool in _types(field)
        follows = bool(rest) and not rest[0].startswith("--") and "=" not in rest[0]
        value = rest.pop(0) if rest and (follows or not is_switch) else ("true" if is_switch else "")
        if value == "":
            raise ConfigError(f"command line: {name} needs a value: {name}=<value>")
    _override(request, f"{field}={value}")


def _next(name: str, rest: list[str]) -> str:
    if not rest:
        raise ConfigError(f"command line: {name} needs a value: {name}=<value>")
    return rest.pop(0)


def _positional(request: Request, word: str) -> None:
    if Path(word).suffix in EXTENSIONS:
        request.models.append(word)
        return
    if Path(word).suffix:
        raise ConfigError(
            f"command line: cannot read '{Path(word).suffix}'. Accepted: {' '.join(EXTENSIONS)}"
        )
    raise ConfigError(
        f"command line: '{word}' is neither a command nor key=value nor a .yaml file."
        + did_you_mean(word, ["train", "generate", "eval", "show", "bench"])
    )


def _override(request: Request, word: str) -> None:
    """One `key=value` (with Hydra's prefixes + ++ ~), in canonical spelling."""
    mark = word[: len(word) - len(word.lstrip("+~"))]
    key, equals, value = word[len(mark) :].partition("=")
    if key in ("hydra_model_cfg", "model", "configs@_global_"):
        request.models.append(value)
        return
    if key.startswith(("hydra.", "hydra/", "+hydra")) or key == "hydra":
        request.overrides.append(word)
        request.values[key] = value
        _check_plugin(key, value)
        return
    key = _canonical(request, key)
    if key == "kernels":
        for op, name in _entries(value):
            _override(request, f"{mark}kernels.{op}={name}")
        return
    if key in request.keys:
        request.notices.append(f"{key} is given more than once; the last value counts")
    request.keys.add(key)
    if mark.startswith("~"):
        _deletion(request, key)
        return
    if key in GROUPS or key in tuple(f"configs/{g}" for g in GROUPS):
        _group(request, key.removeprefix("configs/"), value)
        return
    root, _, leaf = key.partition(".")
    known = key in GENERIC_FIELDS or (root in _OPEN and leaf)
    if not known:
        request.problems.append(unknown_key(key))
    prefix = "" if key in GENERIC_FIELDS else "++"
    parsed = parse_override(f"{prefix}{key}={_quoted(key, value)}")
    if parsed.is_sweep_override():
        request.sweeps.add(key)
    else:
        request.values[key] = parsed.value()
    request.overrides.append(parsed.input_line or "")


def _entries(value: str) -> list[tuple[str, str]]:
    """`V` or `{op: V, ...}` of the field kernels."""
    if not value.startswith("{"):
        return [("default", value)]
    parsed = parse_override(f"kernels={value}").value()
    if not isinstance(parsed, dict):
        raise ConfigError(
            f"command line: kernels: one mapping is meant, or kernels.<operation>=..., got {value}"
        )
    return [(str(op), str(name)) for op, name in parsed.items()]


def _canonical(request: Request, key: str) -> str:
    if key in RENAMED:
        request.notices.append(f"'{key}' is read as '{RENAMED[key]}'")
        return RENAMED[key]
    root, dot, leaf = key.partition(".")
    return f"model_cfg.{ARCHITECTURE_ALIASES.get(leaf, leaf)}" if root == "model_cfg" and dot else key


def unknown_key(key: str, where: str = "command line") -> str:
    """The message for a key that is no generic field."""
    if key in REMOVED:
        return f"{where}: '{key}' is no longer a field: {REMOVED[key]}"
    root, _, leaf = key.partition(".")
    word = ARCHITECTURE_ALIASES.get(root, root)
    if word in ARCHITECTURE_WORDS and not leaf:
        return f"{where}: '{root}' is an architecture field here: set model_cfg.{word}"
    return f"{where}: unknown key '{key}'.{suggest_key(key, GENERIC_FIELDS, _ARCHITECTURE_PATHS)}"


def _deletion(request: Request, key: str) -> None:
    root, _, leaf = key.partition(".")
    if key in GENERIC_FIELDS:
        raise ConfigError(f"command line: '{key}' is required and cannot be deleted. Set it: {key}=<value>")
    if root not in _OPEN or not leaf:
        raise ConfigError(unknown_key(key))
    request.overrides.append(f"~{key}")


def _group(request: Request, group: str, value: str) -> None:
    parsed = parse_override(f"configs/{group}={value}")
    names = override_choices(parsed, choices(group))
    for name in names if group != "preset" else [n for n in names if n != "auto"]:
        check_option(group, name, "command line")
    if len(names) > 1 or parsed.is_sweep_override():
        request.sweeps.add(group)
        if "auto" in names:
            raise ConfigError(
                "command line: preset=auto cannot stand in a sweep. Name the sizes, e.g. preset=nano"
            )
        request.overrides.append(parsed.input_line or "")
        request.values[group] = names
    else:
        request.values[group] = names[0]
        if names[0] != "auto":
            request.overrides.append(f"configs/{group}={names[0]}")


def override_choices(parsed: Override, available: list[str]) -> list[str]:
    value = parsed.value()
    if isinstance(value, ChoiceSweep):
        return [str(getattr(v, "text", v)) for v in value.list]  # a quoted one is an object
    if isinstance(value, Glob):
        return value.filter(available)
    return [str(value)]


def _check_plugin(key: str, value: str) -> None:
    """A launcher or sweeper that is not installed, before Hydra says so in its own words."""
    kind = key.removeprefix("hydra/")
    if kind not in ("launcher", "sweeper") or (kind, value) not in PLUGINS:
        return
    Plugins.instance()  # registers the options of every plugin that is installed
    if f"{value}.yaml" not in ConfigStore.instance().list(f"hydra/{kind}"):
        package, extra = PLUGINS[kind, value]
        raise ConfigError(
            f"command line: {kind} '{value}' needs the package {package}: pip install \"mytrainer[{extra}]\""
        )


def parse_override(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, _, value = text.lstrip("+").partition("=")
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"command line: {key}: cannot read the value {value!r} ({reason}). "
            f"Quote it twice, once for the shell: {key}='\"...\"'"
        ) from None


def _quoted(key: str, value: str) -> str:
    """A value for a text field, quoted where Hydra's grammar would misread it as a number or not at all."""
    is_text = key.startswith("env.") or (key in GENERIC_FIELDS and str in _types(key))
    if not is_text or value[:1] in ("'", '"') or value == "null" or value.startswith("${"):
        return value
    try:
        parsed = OverridesParser.create().parse_override(f"x={value}")
        if parsed.is_sweep_override() or isinstance(parsed.value(), str):
            return value
        if key.startswith("env.") and isinstance(parsed.value(), list | dict):
            return value  # for the typed check to refuse
    except HydraException:
        pass
    escaped = value.replace("\\'", "\\\\'").replace("'", "\\'")
    return f"'{escaped}'" if not escaped.endswith("\\") else value


def _types(field: str) -> set[Any]:
    """The plain types that a generic field accepts."""

    def leaves(annotation: Any) -> set[Any]:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            return leaves(typing.get_args(annotation)[0])
        if origin in (typing.Union, types.UnionType):
            return set().union(*(leaves(a) for a in typing.get_args(annotation)))
        return {annotation}

    return leaves(RunConfig.model_fields[field].annotation)
