"""argv -> one composed, checked, frozen configuration.

The folder `configs/` is a Hydra option group placed at the global package: `--hydra_model_cfg=X` becomes the
group choice `configs@_global_=X`, `preset=Y` becomes `configs/preset=Y`. Hydra composes; this file only
translates before and checks after. Order of priority, low to high: defaults of the architecture's Config,
training.yaml, the model file (its parents first), the preset and what `preset/for/` adds to it for the
type, the command line.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs import runs
from configs.choose import model_paths
from configs.files import (
    CONFIGS,
    ROOT,
    Locations,
    Node,
    choices,
    describe,
    description,
    digest,
    options,
    read,
    read_model,
    shown,
)
from configs.frontend import SIZE_KEYS, Request, override_choices, parse, parse_override
from configs.hardware import uses_cuda
from configs.messages import REDACTED, ConfigError, is_secret
from configs.registry import AMENDMENTS, Model, Registry, amendments
from configs.schema import GENERIC_FIELDS, ModelConfig, RunConfig
from configs.unread import unread
from configs.validate import architecture_config, validate

APP = "mytrainer"
MODEL_GROUP = "configs@_global_"


@dataclasses.dataclass
class Plan:
    """A command line, understood: what Hydra is to be told, and what is needed to explain its result."""

    request: Request
    overrides: list[str]  # for Hydra
    models: dict[str, Model]  # by option name
    saved: tuple[dict[str, Any], Path] | None  # the architecture of the run that goes on
    secrets: dict[str, str]  # environment variables that must not reach any file
    notices: list[str]

    def where(self, option: str, tree: dict[str, Any]) -> Locations:
        """Origins of the keys of a composition with this model."""
        model = self.models[option]
        chosen = [(g, tree[g]) for g in ("data", "preset") if g in self.request.values]
        layers = [read(CONFIGS / g / f"{n}.yaml") for g, n in chosen if n in options(g)]
        amendment = model.amendments.get(str(tree.get("preset"))) if "preset" in self.request.values else None
        layers += [amendment] if amendment else []
        return Locations([*model.layers, *layers], self.request.keys)


@dataclasses.dataclass(frozen=True)
class Checked:
    """One run, ready to start."""

    cfg: RunConfig
    model_cfg: ModelConfig
    folder: Path | None  # None: named by the clock
    origin: str  # the model file and its digest


def compose(
    overrides: list[str], notify: Callable[[str], None] | None = None
) -> tuple[RunConfig, ModelConfig]:
    """Compose and check one run. `overrides` are words of the command line (`["model=gpt2", "preset=tiny"]`).

    Raises ConfigError. `notify` receives the remarks that stop nothing; default: stderr.
    """
    plan = prepare(overrides)
    checked = check(plan, compose_tree(plan.overrides))
    for text in plan.notices:
        (notify or _to_stderr)(text)
    return checked.cfg, checked.model_cfg


def _to_stderr(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def list_configs() -> list[tuple[str, str]]:
    """(option name, one-line description) of every model file in configs/."""
    return [(name, description(CONFIGS / f"{name}.yaml")) for name in options()]


def model_config_class(cfg: RunConfig) -> type[ModelConfig]:
    """The Config class of a run's architecture. Imports its model file."""
    return architecture_config(cfg.type, cfg.model_adapter, lambda key: "")


def prepare(argv: list[str]) -> Plan:
    """Understand a command line. Raises ConfigError with all problems of its words together."""
    request = parse(argv)
    nodes, function = _models(request)
    if request.problems:
        raise ConfigError(request.problems)
    folder = runs.named_folder(request.values, request.keys)
    saved = runs.saved_architecture(request.values, folder)
    preset = _preset(request, nodes, saved)
    registry = Registry(use_presets=not preset and "preset" not in request.values)
    added = [_option(n, request, registry) for n in nodes]
    names = {model.option: model for model in added}
    overrides = list(request.overrides)
    if preset:
        request.values["preset"] = preset
        overrides.insert(0, f"configs/preset={preset}")
    if names:
        value = ",".join(f"'{n}'" for n in names)
        overrides.insert(
            0, f"{MODEL_GROUP}={f'{function}({value})' if function and request.multirun else value}"
        )
    if len(names) > 1:
        overrides = [_added(o) for o in overrides]
    secrets = _hide_secrets(request, nodes, overrides)
    register()
    request.notices += [note for n in nodes for node in n.chain() for note in node.notices]
    return Plan(request, overrides, names, saved, secrets, list(dict.fromkeys(request.notices)))


def _models(request: Request) -> tuple[list[Node], str]:
    """The model files of a request. Their problems join those of the other words."""
    try:
        if not request.models and not request.needs_no_model:
            if request.problems:  # a word that could not be read may have been the model
                return [], ""
            implied = runs.implied_model(request)
            if implied is None:
                raise ConfigError(
                    "no model chosen. Give --hydra_model_cfg=configs/<name>.yaml; "
                    f"available: {', '.join(options())}"
                )
            request.models.append(f"'{implied}'")
        paths, function = model_paths(request)
        return [read_model(p) for p in paths], function
    except ConfigError as error:
        request.problems += error.problems
        return [], ""


def _option(node: Node, request: Request, registry: Registry) -> Model:
    """A file without `type` has the type of its own name if there is such an architecture, else vanilla."""
    if "type" in request.sweeps:
        _refuse_amended(node, request)
    type_ = request.values.get("type") or node.stated("type")
    if type_ or "type" in request.keys:
        return registry.add(node, str(type_))
    import models

    type_ = node.path.stem if node.path.stem in models.ARCHITECTURES else "vanilla"
    request.notices.append(f"{shown(node.path)} states no type: taken as {type_}")
    return registry.add(node, type_, {"type": type_})


def _refuse_amended(node: Node, request: Request) -> None:
    """The types of a sweep over `type` share one option, so what a preset means for one of them cannot apply."""
    chosen = request.values.get("preset", node.stated("preset"))
    presets = set(chosen if isinstance(chosen, list) else [chosen])
    (swept,) = (o for o in request.overrides if o.startswith("type="))
    for type_ in override_choices(parse_override(swept), []):
        if amended := presets & amendments(node, type_).keys():
            raise ConfigError(
                f"command line: preset {min(amended)} means something of its own for type {type_}, which a sweep over "
                f"type cannot follow. Sweep over model files: --hydra_model_cfg=a.yaml,b.yaml"
            )


def _preset(request: Request, nodes: list[Node], saved: tuple[dict[str, Any], Path] | None) -> str:
    """The preset that `auto` stands for; nothing where the command line or the file names one."""
    if request.values.get("preset", "auto") != "auto" or not nodes:
        return ""
    stated = {n.stated("preset") for n in nodes} - {None, "auto"}
    if stated and "preset" not in request.values:
        return ""
    if saved:
        begun_with = str(saved[0].get("preset"))
        return begun_with if begun_with in options("preset") else "none"
    shipped = all(n.path.parent == CONFIGS and n.stated("type") == n.path.stem for n in nodes)
    sized = [k for k in SIZE_KEYS if f"model_cfg.{k}" in request.keys]
    data = request.values.get("data") or next(
        (n.stated("data") for n in nodes if n.stated("data")), "embedded"
    )
    if shipped and data == "embedded" and sized:
        request.notices.append(
            f"preset auto: the file's own full size, as model_cfg.{sized[0]} is given. Add preset=nano (or another) to "
            f"change that one and have a small run"
        )
    if not shipped or sized or data != "embedded":
        return "none"
    on_cuda = uses_cuda(str(request.values.get("device", "auto")))
    preset, why = ("small", "CUDA") if on_cuda else ("nano", "no CUDA device")
    size = description(CONFIGS / "preset" / f"{preset}.yaml").split(".")[0].split(",")[0]
    command = f"python mytrainer.py --hydra_model_cfg={','.join(shown(n.path) for n in nodes)} preset=none"
    request.notices.append(f"preset auto: {preset} ({why}, embedded corpus; {size}). Full size: {command}")
    return preset


def _added(override: str) -> str:
    """A generic field set to one value, as `++key=value`: Hydra composes a sweep over models once without any
    of them, where no such field exists yet. Swept fields stay out of that composition by themselves."""
    generic = override.partition("=")[0] in GENERIC_FIELDS
    return f"++{override}" if generic and not parse_override(override).is_sweep_override() else override


def _hide_secrets(request: Request, nodes: list[Node], overrides: list[str]) -> dict[str, str]:
    """Take secret environment variables out of what Hydra sees, prints and saves; returns them."""
    secrets = {
        k: str(v)
        for node in nodes
        for n in node.chain()
        for k, v in (n.values.get("env") or {}).items()
        if is_secret(k)
    }
    for key in [k for k in request.keys if k.startswith("env.") and is_secret(k)]:
        if key in request.sweeps:
            raise ConfigError(f"command line: {key} is a secret and cannot be swept over")
        if key in request.values:
            secrets[key.removeprefix("env.")] = str(request.values[key])
            overrides[:] = [o for o in overrides if not o.startswith(f"++{key}=")]
    overrides += [f"++env.{name}='{REDACTED}'" for name in secrets]
    return {k: v for k, v in secrets.items() if v != REDACTED}


def register() -> None:
    """Store the root config: three group choices and Hydra's own settings."""
    settings: dict[str, Any] = {
        "job": {"name": APP, "chdir": False},
        # By the clock to be found, and by a number of its own: two sweeps may start in one second.
        "sweep": {
            "dir": f"multirun/${{now:%Y-%m-%d}}/${{now:%H-%M-%S}}-{token_hex(2)}",
            "subdir": "${hydra.job.num}",
        },
    }
    node = {
        "defaults": [
            {MODEL_GROUP: None},
            {"configs/data": None},
            {"configs/preset": None},
            # What a size means for one architecture besides (configs/registry.py); wins over the preset's own.
            {f"optional configs/{AMENDMENTS}": f"${{{MODEL_GROUP}}}-${{configs/preset}}"},
            "_self_",
            {"override hydra/job_logging": "none"},
        ],
        "hydra": settings,
    }
    store = ConfigStore.instance()
    store.store(name=APP, node=node)
    for name in set(choices("data")) - set(options("data")):  # rows of the table need no file
        store.store(group="configs/data", name=name, node={"data": name}, package="_global_")


def help_text() -> str:
    """What `--help` says before it shows the composed config."""

    def listing(folder: str) -> str:
        lines = [f"  {n:<12} {describe(folder, n)}" for n in choices(folder)]
        return "\n".join(lines)

    return f"""Train:  python mytrainer.py --hydra_model_cfg=configs/<name>.yaml [preset=<size>] [key=value]
Sweep:  python mytrainer.py --hydra_model_cfg=a,b learning_rate=1e-3,3e-4 -m    (a process per point)
Go on:  python mytrainer.py --model_name <name> [--num_iterations N]           (checkpoints/<name>)
Other:  python mytrainer.py generate | eval | show | bench --help

Show instead of run: --cfg job [--resolve] [--package model_cfg], --info defaults-tree

Models (--hydra_model_cfg=configs/<name>.yaml, or any YAML file of yours):
{listing("")}

Sizes (preset=<name>):
{listing("preset")}

Data (data=<name>):
{listing("data")}
"""


@contextmanager
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(config_dir=str(ROOT), version_base="1.3", job_name=APP):
            yield
    except (HydraException, OmegaConfBaseException) as error:
        first = str(error).strip().split("\n")[0]
        raise ConfigError(f"command line: {first}") from error


def compose_hydra(overrides: list[str]) -> DictConfig:
    """Hydra's composition, its own settings included."""
    with _hydra():
        return hydra.compose(APP, overrides, return_hydra_config=True)


def compose_tree(overrides: list[str]) -> dict[str, Any]:
    """Hydra's composition, resolved, as plain values."""
    with _hydra():
        tree = OmegaConf.to_container(hydra.compose(APP, overrides), resolve=True)
    assert isinstance(tree, dict)
    return {str(k): v for k, v in tree.items()}


def check(plan: Plan, tree: dict[str, Any], option: str | None = None) -> Checked:
    """Check one composition: the lock of the run that goes on, then everything `validate` knows."""
    option = option or next(iter(plan.models))
    folder = runs.named_folder(tree, plan.request.keys)
    saved = plan.saved or runs.saved_architecture(tree, folder)
    if saved:
        free = architecture_config(saved[0]["type"], saved[0].get("model_adapter"), lambda key: "").free()
        runs.apply_lock(tree, *saved, plan.request.keys, plan.notices, free)
    cfg, model_cfg = validate(tree, plan.where(option, tree), plan.notices)
    remark = unread(cfg, model_cfg, plan.request.keys)
    plan.notices += [remark] if remark else []
    runs.refuse_overwrite(tree, folder)
    path = plan.models[option].path
    return Checked(cfg, model_cfg, folder, f"{path} (sha256 {digest(path)})")


def check_grid(plan: Plan) -> list[Checked] | None:
    """Compose and check every point of a grid before the first starts; `None` for other sweepers, whose
    trials do not exist yet. One bad point stops all, and the message lists every bad one."""
    parser = OverridesParser.create()
    parsed = parser.parse_overrides(plan.overrides)
    fixed = [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
    settings = compose_hydra([*fixed, f"{MODEL_GROUP}='{next(iter(plan.models))}'"]).hydra.sweeper
    if not str(settings.get("_target_", "")).endswith(".BasicSweeper"):
        return None
    extra = [f"{k}={v}" for k, v in (settings.get("params") or {}).items()]
    (points,) = BasicSweeper.split_arguments(parser.parse_overrides([*extra, *plan.overrides]), None)
    varied = {
        o.get_key_element()
        for o in parser.parse_overrides([*extra, *plan.overrides])
        if o.is_sweep_override()
    }
    problems: list[str] = []
    checked: list[Checked] = []
    for number, point in enumerate(points):
        label = " ".join(p.replace(MODEL_GROUP, "model") for p in point if p.split("=")[0] in varied)
        option = next(p.partition("=")[2].strip("'") for p in point if p.startswith(f"{MODEL_GROUP}="))
        try:
            checked.append(check(plan, compose_tree(point), option))
        except ConfigError as error:
            problems += [f"job {number} ({label}): {p}" for p in error.problems]
    folders = [c.folder for c in checked if c.folder]
    if len(set(folders)) < len(folders):
        shared = next(f for f in folders if folders.count(f) > 1)
        problems.append(
            f"{folders.count(shared)} jobs would share the run folder {shared}. "
            "Leave model_name and output_dir out of a sweep, or sweep over them too"
        )
    if problems:
        raise ConfigError(problems)
    return checked
