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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
from configs import heads, runs, trust, weights
from configs.choose import model_paths
from configs.concealed import lacking
from configs.files import (
    BASE,
    CONFIGS,
    EXTENSIONS,
    Locations,
    Node,
    digest,
    option_path,
    options,
    read_model,
    read_option,
    shown,
    sizes,
)
from configs.frontend import as_gpt, parse, size
from configs.grammar import override_choices, parse_override
from configs.hydra_app import MODEL_GROUP, compose_tree, register
from configs.messages import REDACTED, ConfigError, is_secret, loads_code
from configs.paths import usable_paths
from configs.registry import Model, Registry, amendments
from configs.request import Request
from configs.schema import GENERIC_FIELDS, ModelConfig, RunConfig
from configs.secret import reads_secret, secret_value
from configs.shape import misshapen
from configs.size import automatic_preset, without_preset_budget
from configs.strangers import refuse_code, tame
from configs.unread import unread
from configs.validate import architecture_config, met, refuse_own_words, validate
from naming import load

ANY_MODEL = "vanilla"  # every configuration has one: for commands that read nothing of it


@dataclasses.dataclass
class Plan:
    """A command line, understood: what Hydra is to be told, and what is needed to explain its result."""

    request: Request
    overrides: list[str]  # for Hydra
    models: dict[str, Model]  # by option name
    saved: tuple[dict[str, Any], Path] | None  # the architecture of the run that goes on
    secrets: dict[str, str]  # environment variables that must not reach any file
    notices: list[str]
    trusted: frozenset[str]  # modules outside of the table that may be imported

    def kept_heads(self, option: str | None, tree: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Have heads keep their width in a composition with this model (`heads.keep_widths`)."""
        if not heads.given(self.request.keys):
            return [], []
        return heads.keep_widths(tree, heads.told(self.where(option, tree).layers), self.request.keys)

    def told_of_heads(self) -> list[dict[str, Any]]:
        """What the jobs of a sweep need to know for that, by `model` and `preset` ("" where none is chosen for all)."""
        if not heads.given(self.request.keys):
            return []
        chosen = self.request.values.get("preset", "")
        presets = chosen if isinstance(chosen, list) else [chosen]
        return [
            {"model": model, "preset": preset, **heads.told(self.where(model, {"preset": preset}).layers)}
            for model in self.models
            for preset in presets
        ]

    def where(self, option: str | None, tree: Mapping[str, Any]) -> Locations:
        """Origins of the keys of a composition with this model (None: the first)."""
        if not self.models:
            return Locations([], self.request.keys)
        model = self.models[option or next(iter(self.models))]
        chosen = [(g, tree.get(g)) for g in ("data", "preset") if g in self.request.values]
        layers = [read_option(g, str(n)) for g, n in chosen if option_path(g, str(n)).is_file()]
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
    plan = prepare_one(overrides)
    checked = check(plan, tree_of(plan))
    for text in [*plan.notices, *two_rates(plan, checked.cfg)]:
        (notify or _to_stderr)(text)
    return checked.cfg, checked.model_cfg


def _to_stderr(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def tree_of(plan: Plan, overrides: list[str] | None = None, option: str | None = None) -> dict[str, Any]:
    """The composition of a plan, or of one point of its sweep. Raises ConfigError with the place of what is wrong."""
    point = plan.overrides if overrides is None else overrides
    return compose_tree(point, plan.where(option, plan.request.values))


def model_config_class(cfg: RunConfig) -> type[ModelConfig]:
    """The Config class of a run's architecture. Imports its model file."""
    return architecture_config(cfg.type, cfg.model_adapter, lambda key: "")


def prepare(argv: list[str], recorded: Path | None = None) -> Plan:
    """Understand a command line. Raises ConfigError with all problems of its words together. `recorded`: the record of
    a sweep that it was read from."""
    request = parse(argv)
    nodes, function = _models(request)
    if request.problems:
        raise ConfigError(request.problems)
    _spell(request, nodes)
    _imply_source(request, nodes)
    folder = runs.named_folder(request.values, request.keys)
    saved = runs.saved_architecture(request.values, folder)
    trusted = refuse_code(nodes, request, saved, recorded)
    begun_from = [] if saved else weights.sizes_given(request, nodes)
    preset = automatic_preset(request, nodes, saved, begun_from)
    tame(nodes, request.implied, request.keys, request.notices)
    # The config.yaml of a run states all that a preset brought to it, whose file may be gone.
    of_run = saved and folder and [n.path for n in nodes] == [(folder / "config.yaml").resolve()]
    use_presets = not (preset or of_run or "preset" in request.values)
    if use_presets:
        _own_sizes(request, nodes)
    registry = Registry(use_presets=use_presets, sizes=request.sizes)
    added = [_option(n, request, registry) for n in nodes]
    names = {model.option: model for model in added}
    _explain_rows(request, nodes)
    overrides = list(request.overrides)
    if preset:
        request.values["preset"] = preset
        overrides.insert(0, f"configs/preset={preset}")
    overrides += without_preset_budget(request, nodes)
    if names:
        value = ",".join(f"'{n}'" for n in names)
        overrides.insert(
            0, f"{MODEL_GROUP}={f'{function}({value})' if function and request.multirun else value}"
        )
    if len(names) > 1:
        overrides = [_added(o) for o in overrides]
    secrets = _hide_secrets(request, nodes, overrides)
    register(_sizes_asked(request, nodes))
    request.notices += _sizes_said(request)
    request.notices += [note for n in nodes for node in n.chain() for note in node.notices]
    return Plan(request, overrides, names, saved, secrets, list(dict.fromkeys(request.notices)), trusted)


def prepare_one(words: list[str]) -> Plan:
    """The same of one run to be started; what shows something or asks for several is refused."""
    plan = prepare(words)
    if plan.request.mode != "run" or plan.request.multirun:
        raise ConfigError("command line: one run is meant here. Leave out --cfg, --info, --help and -m")
    return plan


def _models(request: Request) -> tuple[list[Node], str]:
    """The model files of a request. Their problems join those of the other words."""
    try:
        if not request.models and not request.needs_no_model:
            if request.problems:  # a word that could not be read may have been the model
                return [], ""
            if request.gpt_sizes.keys() - {"batch_size"} and not _goes_on(request):
                as_gpt(request)
                return _models(request)
            implied = weights.implied_model(request) or runs.implied_model(request) or _of_size(request)
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
        if request.implied:  # a run's own file, which nobody wrote
            request.problems[-1] += runs.how_without_its_file(request.implied.parent)
        return [], ""


def _goes_on(request: Request) -> bool:
    """Whether a command without a model names a run that is there, or weights that say theirs."""
    folder = runs.run_meant(request)
    named = bool(folder and (folder / "config.yaml").is_file())
    return named or any(request.values.get(key) for key in ("preset", "init_from_checkpoint"))


def _spell(request: Request, nodes: list[Node]) -> None:
    """Give fields the spelling of their type, where it has others of its own."""
    types = {str(request.values.get("type") or node.stated("type")) for node in nodes}
    rows = [models.ARCHITECTURES[type_] for type_ in types if type_ in models.ARCHITECTURES]
    if len(rows) != len(types) or "type" in request.sweeps:
        return
    for word in {word for row in rows for word in row.spellings}:
        meant = {row.spellings.get(word) for row in rows}
        if f"model_cfg.{word}" in request.keys and len(meant) == 1:
            request.respell(f"model_cfg.{word}", f"model_cfg.{meant.pop()}")


def _of_size(request: Request) -> str | None:
    """The model file of a command that names a size alone: a gpt2, where a JSON file is of that size."""
    path = CONFIGS / f"{request.values.get('preset')}.json"
    return str(path) if path.is_file() else None


def _own_sizes(request: Request, nodes: list[Node]) -> None:
    """Have `preset: <file>.json` of a file mean the file at that path, from where it is said, from here or from the
    project."""
    for node in (inner for n in nodes for inner in n.chain()):
        given = node.values.get("preset")
        if isinstance(given, str) and not node.size and Path(given).suffix == ".json":
            node.values["preset"], _ = size(request, given, node.place("preset"), (node.path.parent,))


def _sizes_asked(request: Request, nodes: list[Node]) -> dict[str, str]:
    """The JSON files among the presets that a command line or a file names, by their option."""
    chosen = request.values.get("preset")
    layers = [inner for node in nodes for inner in node.chain()]
    named = {*(chosen if isinstance(chosen, list) else [chosen])}
    named |= {
        name for node in layers for name in (node.size, node.values.get("preset")) if isinstance(name, str)
    }
    return {name: name for name in sizes() & named} | {k: str(path) for k, path in request.sizes.items()}


def _sizes_said(request: Request) -> list[str]:
    """What the presets of one's own say of themselves, and of what they leave out."""
    return [note for path in request.sizes.values() for note in read_option("preset", str(path)).notices]


def _explain_rows(request: Request, nodes: list[Node]) -> None:
    """Where a file of another project calls the rows of a step so, `batch_size` on the command line is still ours."""
    counts = {"batch_size", "gradient_accumulation_steps", "global_batch_size"}
    if counts & request.keys != {"batch_size"}:
        return
    if _rows_of_the_line(request, nodes):
        return
    for node in nodes:
        if node.rows.get("batch_size"):
            request.notices.append(
                f"batch_size on the command line is the rows of a micro-step; a step has the "
                f"{node.stated('global_batch_size')} of {shown(node.path)}. To change these: global_batch_size=<rows>"
            )


def _rows_of_the_line(request: Request, nodes: list[Node]) -> bool:
    """Where such a file has no multiple of these rows, have a step as it counts them: `batch_size` times its
    `gradient_accumulation_steps`. Whether that is so."""
    rows = request.values.get("batch_size")
    if len(nodes) != 1 or type(rows) is not int or rows < 1 or not nodes[0].rows.get("batch_size"):
        return False
    before, steps = nodes[0].stated("global_batch_size"), nodes[0].rows.get("gradient_accumulation_steps", 1)
    if before % rows == 0:
        return False
    request.overrides.append(f"global_batch_size={rows * steps}")
    request.notices.append(
        f"global_batch_size is {rows * steps}, batch_size {rows} times the gradient_accumulation_steps of "
        f"{shown(nodes[0].path)} ({steps}): its {before} rows are no multiple of {rows}"
    )
    return True


def _imply_source(request: Request, nodes: list[Node]) -> None:
    """`input_file=F`, `train_files=F`, `dataset_name=D` or `mix=[...]` alone means the source of text that reads it; no
    file has to say so, nor the command line."""
    from data import source_of

    stated = [n for node in nodes for n in node.chain() if n.path != BASE and n.values.get("data")]
    if "data" in request.keys or stated:
        return
    found = {
        field: request.values.get(field) or next((v for n in nodes if (v := n.stated(field))), None)
        for field in ("input_file", "train_files", "dataset_name", "mix")
    }
    # A mixture is meant whatever else is: its entries have the other fields.
    for field in sorted(found, key=lambda field: field != "mix" or found[field] is None):
        value = found[field]
        if value is None and field not in request.keys:
            continue
        source = source_of(field, value)
        request.values["data"] = source
        request.overrides.append(f"configs/data={source}")
        request.notices.append(f"{field} is given: data={source}")
        return


def _option(node: Node, request: Request, registry: Registry) -> Model:
    """A file without `type` has the type of its own name if there is such an architecture, else vanilla."""
    if "type" in request.sweeps:
        _refuse_amended(node, request)
    type_ = request.values.get("type") or node.stated("type")
    if type_ or "type" in request.keys:
        added = registry.add(node, str(type_))
    else:
        type_ = node.path.stem if node.path.stem in models.ARCHITECTURES else "vanilla"
        request.notices.append(f"{shown(node.path)} states no type: taken as {type_}")
        added = registry.add(node, type_, {"type": type_})
    _refuse_own_words(added, _types(request, type_), request)
    _refuse_loading(added, request)
    return added


def _types(request: Request, type_: Any) -> list[str]:
    """The types that a model file is trained as: one, or those of a sweep over `type`."""
    if "type" not in request.sweeps:
        return [str(type_)]
    return override_choices(parse_override(f"type={request.written('type')}"), [])


def _refuse_own_words(model: Model, types: list[str], request: Request) -> None:
    """Keys that were read as another spelling of a field, though in this architecture's world they mean another."""
    for type_ in types:
        for spelled in request.spelled.values():
            refuse_own_words(type_, [spelled], "command line")
        for node in (*model.layers, *model.amendments.values()):
            for key, line in node.lines.items():
                refuse_own_words(type_, [key], f"{shown(node.path)}:{line}")


def _refuse_loading(model: Model, request: Request) -> None:
    """Raises where a file sets an environment variable that decides what code a program loads: a configuration may come
    from anywhere, and runs nothing. Who types such a variable means it."""
    problems = []
    for node in (*model.layers, *model.amendments.values()):
        env = node.values.get("env")
        for name in env if isinstance(env, dict) else ():
            if loads_code(str(name)) and f"env.{name}" not in request.keys:
                line = node.lines.get(f"env.{name}", node.lines.get("env", 1))
                problems.append(
                    f"{shown(node.path)}:{line}: env.{name} changes what programs load, which no file may. Give it "
                    f"on the command line, env.{name}=<value>, or set it in the shell"
                )
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _refuse_amended(node: Node, request: Request) -> None:
    """The types of a sweep over `type` share one option, so what a preset means for one of them cannot apply."""
    chosen = request.values.get("preset", node.stated("preset"))
    presets = set(chosen if isinstance(chosen, list) else [chosen])
    for type_ in _types(request, None):
        if amended := presets & amendments(node, type_).keys():
            raise ConfigError(
                f"command line: preset {min(amended)} means something of its own for type {type_}, which a sweep over "
                f"type cannot follow. Sweep over model files: --hydra_model_cfg=a.yaml,b.yaml"
            )


def _added(override: str) -> str:
    """A generic field set to one value, as `++key=value`: Hydra composes a sweep over models once without any
    of them, where no such field exists yet. Swept fields stay out of that composition by themselves."""
    generic = override.partition("=")[0] in GENERIC_FIELDS
    return f"++{override}" if generic and not parse_override(override).is_sweep_override() else override


def _hide_secrets(request: Request, nodes: list[Node], overrides: list[str]) -> dict[str, str]:
    """Take secret environment variables out of what Hydra sees, prints and saves; returns them."""
    given = [n.values.get("env") for node in nodes for n in node.chain()]
    secrets = {
        str(k): v
        for env in given
        if isinstance(env, dict)
        for k, v in env.items()
        if is_secret(str(k)) or reads_secret(v)
    }
    of_line = [k for k in request.keys if k.startswith("env.")]
    for key in [k for k in of_line if is_secret(k) or reads_secret(request.values.get(k))]:
        if key in request.sweeps:
            raise ConfigError(f"command line: {key} is a secret and cannot be swept over")
        if key in request.values:
            secrets[key.removeprefix("env.")] = request.values[key]
            overrides[:] = [o for o in overrides if not o.startswith(f"++{key}=")]
    values = {name: secret_value(name, given) for name, given in secrets.items()}
    overrides += [f"++env.{name}='{REDACTED}'" for name in secrets]
    return {k: v for k, v in values.items() if v != REDACTED}


def check(plan: Plan, tree: dict[str, Any], option: str | None = None) -> Checked:
    """Check one composition: the lock of the run that goes on, or of the weights that one begins from, then everything
    that `validate` knows."""
    option = option or next(iter(plan.models))
    where: Callable[[str], str] = plan.where(option, tree)
    if problems := [*misshapen(tree, where, resolved=True), *_asked_for(tree, where)]:
        raise ConfigError(problems)
    tree.update(usable_paths(tree, where))
    folder = runs.named_folder(tree, plan.request.keys)
    saved = plan.saved or runs.saved_architecture(tree, folder)
    unfit: list[str] = []
    asked = tree.get("model_cfg")
    if saved:
        trust.refuse(saved[0], str(saved[1]), runs.folder_of_path(saved[1].parent), plan.trusted)
        free = architecture_config(saved[0]["type"], saved[0].get("model_adapter"), lambda key: "").free()
        runs.apply_lock(tree, *saved, plan.request.keys, plan.notices, free)
    else:
        of_files = where
        where = weights.take_sizes(tree, plan.request.keys, plan.notices, where)
        if where is of_files:  # no weights say how many heads there are
            remarks, unfit = plan.kept_heads(option, tree)
            plan.notices += remarks
    cfg, model_cfg = validate(tree, where, plan.notices, unfit)
    cfg, model_cfg = met(
        cfg, model_cfg, where, plan.notices, plan.request.keys, asked=asked if saved else None
    )
    remark = unread(cfg, model_cfg, plan.request.keys)
    plan.notices += [remark] if remark else []
    runs.refuse_overwrite(tree, folder)
    path = plan.models[option].path
    return Checked(cfg, model_cfg, folder, f"{path} (sha256 {digest(path)})")


def _asked_for(tree: dict[str, Any], where: Callable[[str], str]) -> list[str]:
    """What is said of fields that a run had from secrets."""
    return [
        f"{where(key) or 'config'}: {key} is {REDACTED}: it held a secret, which no file of the run keeps. Give it "
        f"again, {key}='${{oc.env:<NAME>}}'"
        for key, value in tree.items()
        if key != "env" and lacking(value)
    ]


def two_rates(plan: Plan, cfg: RunConfig) -> list[str]:
    """A remark for who trains: what `learning_rate` is the rate of, where the command line or a file of another project
    states it and matrices have one of their own."""
    own = load("trainer.optim:OPTIMIZERS")[cfg.optimizer].rate
    one = own == "learning_rate" or cfg.use_lora  # which steps nothing but adapters, all by AdamW
    if one or own in plan.request.keys:
        return []
    foreign = [n for m in plan.models.values() for n in m.layers if n.path.suffix not in EXTENSIONS]
    if "learning_rate" not in plan.request.keys and not any("learning_rate" in n.lines for n in foreign):
        return []
    return [
        f"learning_rate ({cfg.learning_rate:g}) is the rate of everything but the matrices, which {cfg.optimizer} "
        f"steps at {own} ({getattr(cfg, own):g})"
    ]
