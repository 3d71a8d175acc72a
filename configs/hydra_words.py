"""Hydra's own words on our command line: its flags, its plugins, and which of its settings a run heeds.

A sweep is Hydra's; a single run is composed and started here, so of `hydra.*` it heeds what has a counterpart and
refuses the rest.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from configs.messages import ConfigError
from naming import not_one_of

# Spelling -> (name, takes a value). None: the value may be left out.
FLAGS = {
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
    "-i": ("--info", None),
    "--info": ("--info", None),
}
COMPLETION = ("-sc", "--shell-completion")
VALUES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
RUN_DIR, MODE = "hydra.run.dir", "hydra.mode"
# (kind, option) -> (package that brings it, our extra)
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
PROGRAMS = {"submitit_slurm": ("srun", "SLURM")}  # what a launcher calls, and what brings it
# What to do instead, by the beginning of the setting.
_INSTEAD = {
    "hydra.job.chdir": "Relative paths mean the folder that the command is given in; leave it out",
    "hydra.job.env_set": "Variables of a run: env.<NAME>=<value>",
    "hydra.sweep": "It is for sweeps: add -m",
    "hydra.launcher": "It is for sweeps: add -m",
    "hydra/launcher": "It is for sweeps: add -m",
    "hydra/sweeper": "It is for sweeps: add -m",
    "hydra.job.env_copy": "Variables of a run: env.<NAME>=<value>",
}
_NEVER = {
    "hydra": "Name the setting, e.g. hydra.sweep.dir=<folder>",
    "hydra.searchpath": "Files are looked for beside the model file, in configs/, and in --config-dir=<folder>",
}


def is_setting(key: str) -> bool:
    """Whether a key, without + and ~, is Hydra's own."""
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def mode_flag(value: str) -> list[str]:
    """The flags that `hydra.mode=<value>` stands for."""
    if value not in ("RUN", "MULTIRUN"):
        raise ConfigError(f"command line: {MODE}: {not_one_of(value, ('RUN', 'MULTIRUN'))}")
    return ["--multirun"] if value == "MULTIRUN" else []


def flags_together(flags: list[str]) -> list[str]:
    """Problems between flags (as in `Request.flags`): what is shown is one thing of one run."""
    names = [flag.partition("=")[0] for flag in flags]
    shown = [name for name in names if name in ("--cfg", "--info")]
    problems = []
    if shown and "--multirun" in names:
        problems.append(
            f"command line: {shown[0]} shows one run, and -m starts several. Leave out -m, and give one "
            "model and one value of each field"
        )
    if len(shown) > 1 or (shown and "--run" in names):
        problems.append("command line: one of --cfg, --info and --run at a time")
    idle = [name for name in names if name in ("--resolve", "--package")]
    if idle and not {"--cfg", "--help"} & set(names):
        problems.append(f"command line: {idle[0]} is for --cfg, which is not given. Add --cfg job")
    return problems


def check_plugin(key: str, value: str) -> None:
    """A launcher or sweeper that is not installed, before Hydra says so in its own words."""
    kind = key.removeprefix("hydra/")
    if kind not in ("launcher", "sweeper"):
        return
    Plugins.instance()  # registers the options of every plugin that is installed
    options = [name.removesuffix(".yaml") for name in ConfigStore.instance().list(f"hydra/{kind}")]
    if value in options:
        return
    if (kind, value) in PLUGINS:
        package, extra = PLUGINS[kind, value]
        raise ConfigError(
            f"command line: {kind} '{value}' needs the package {package}: pip install \"mytrainer[{extra}]\""
        )
    known = sorted({"basic", *options, *(name for k, name in PLUGINS if k == kind)})
    raise ConfigError(f"command line: {key}: {not_one_of(value, known)}")


def missing_program(launcher: str) -> list[str]:
    """The problem of a launcher whose programs this machine lacks; found before a job is made."""
    program, system = PROGRAMS.get(launcher, ("", ""))
    if not program or shutil.which(program):
        return []
    return [
        f"command line: launcher '{launcher}' hands jobs to {system}, and there is no '{program}' on this machine. "
        f"Start it where {system} is, or take hydra/launcher=basic"
    ]


def unheeded(settings: Iterable[tuple[str, str]], *, sweep: bool) -> list[str]:
    """Problems of `hydra.*` words, given as (key, value), that this command would take and ignore."""
    problems = []
    for key, value in settings:
        chdir = key == "hydra.job.chdir"
        if chdir and value.lower() in ("false", "null"):
            continue  # as it is
        if key in _NEVER:
            problems.append(f"command line: {key} is not read here. {_NEVER[key]}")
        elif chdir or not sweep:
            instead = next((text for name, text in _INSTEAD.items() if key.startswith(name)), "Leave it out")
            problems.append(f"command line: {key}: a run does not read it. {instead}")
    return problems
