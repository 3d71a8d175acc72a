"""A composed tree, checked stage by stage, becomes a `RunConfig` and the architecture's own Config.

Stages: unknown keys and types and ranges of the generic fields; relations between them; the files they
name; then, importing the one model file, the architecture's fields and its constraints. All problems of
a stage are reported together, a later stage runs only if the earlier ones passed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs import trust
from configs.explain import explain
from configs.files import fold_names, fold_type, option_path, read_option
from configs.frontend import unknown_key
from configs.hardware import launched, process_group, uses_cuda, world_size
from configs.messages import ARCHITECTURE_ALIASES, RENAMED, ConfigError, suggest_key
from configs.mixture import problems_alone, stated
from configs.removed import YOUNGER, drop_removed
from configs.runs import not_a_folder
from configs.schema import CHOICES, GENERIC_FIELDS, ModelConfig, RunConfig
from configs.weights import not_weights
from naming import load

Where = Callable[[str], str]  # key -> place of its value, "" if unknown
DEFAULT_GLOBAL_BATCH = 48


def validate(
    tree: Mapping[str, Any],
    where: Where = lambda key: "",
    notices: list[str] | None = None,
    unfit: Iterable[str] = (),
) -> tuple[RunConfig, ModelConfig]:
    """Check a resolved tree. Raises ConfigError with every problem of the first stage that has one.

    `notices` collects remarks that stop nothing (a preset's field that the architecture does not have). `unfit`:
    problems of the architecture that were found before, told before its constraints.
    The returned `RunConfig.model_cfg` states every field of the architecture.
    """
    notices = [] if notices is None else notices
    values = dict(tree)
    run = _generic(values, where, notices)
    _raise(_relations(run), where)
    _raise(_files(run), where)
    config_class = architecture_config(run.type, run.model_adapter, where)
    fields = _drop_preset_extras(run, config_class, where, notices)
    fields = drop_removed(fields, config_class.model_fields, where, notices, "model_cfg.")
    model_cfg = _architecture(run.type, config_class, fields, where)
    _raise([*unfit], where)
    problems = _tokens(run, model_cfg) + _objective(run) + _masks(run, model_cfg) + _adapted(run, model_cfg)
    _raise(problems + model_cfg.problems(run), where)
    notices += model_cfg.remarks(run)
    if getattr(model_cfg, "dropout", 0.0) == 1.0:
        notices.append("model_cfg.dropout is 1.0: every activation it touches becomes zero")
    return run.model_copy(update={"model_cfg": model_cfg.model_dump(mode="json")}), model_cfg


def met(
    run: RunConfig,
    model_cfg: ModelConfig,
    where: Where,
    notices: list[str],
    explicit: set[str],
    asked: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, ModelConfig]:
    """A checked run with the size and length that `match` and `budget` ask for; see `trainer.bench.fit.fitted`.
    Imports the trainer where they ask for any."""
    if not (run.match.given or run.budget.given):
        return run, model_cfg
    run, model_cfg = load("trainer.bench.fit:fitted")(run, model_cfg, explicit, notices, asked)
    _raise(_relations(run), where)
    return run, model_cfg


def refuse_own_words(type_: str, keys: Iterable[str], place: str) -> None:
    """Raises for `model_cfg.<word>` where the type's row of the table has the word as its own."""
    import models

    own = models.ARCHITECTURES[type_].own_words if type_ in models.ARCHITECTURES else {}
    for key in keys:
        root, _, word = key.partition(".")
        if root == "model_cfg" and word in own:
            raise ConfigError(
                f"{place}: {key} is not clear for type '{type_}': {own[word]}. Name one of them"
            )


def read_saved(
    generic: Mapping[str, Any], model_cfg: Mapping[str, Any], source: str, notices: list[str]
) -> tuple[RunConfig, ModelConfig]:
    """What a checkpoint was trained with, from the generic fields and the architecture that it keeps. Relations and
    files are not looked at: a run may be scored where its data is not. `source` is named in the notices."""
    known = drop_removed(generic, GENERIC_FIELDS, lambda key: source, notices)
    cfg = RunConfig.model_validate({**YOUNGER, **known})
    trust.refuse({"type": cfg.type, "model_adapter": cfg.model_adapter}, source, Path(source))
    config_class = architecture_config(cfg.type, cfg.model_adapter, lambda key: source)
    kept = drop_removed(model_cfg, config_class.model_fields, lambda key: source, notices, "model_cfg.")
    architecture = config_class.model_validate(kept)
    return cfg.model_copy(update={"model_cfg": architecture.model_dump(mode="json")}), architecture


def _raise(problems: list[str], where: Where) -> None:
    """Raise if there are problems, each with the place of the first key that it names."""
    if problems:
        raise ConfigError([_placed(p, where) for p in problems])


def _placed(problem: str, where: Where) -> str:
    """The problem behind the place of the first key that it names; of others that stand in another file, theirs."""
    places: dict[str, str] = {}
    for key in re.findall(r"[A-Za-z_][\w.]*", problem):
        key = "mix" if key.startswith("mix.") else key  # an entry of a list has no place of its own
        if key.startswith(("model_cfg.", "kernels.", "match.", "budget.")) or key in GENERIC_FIELDS:
            places.setdefault(key, where(key))
    if not (first := next(iter(places.values()), "")):
        return problem
    files = {key: place for key, place in places.items() if ":" in place and ":" in first}
    others = [
        f"{k} is from {p}" for k, p in files.items() if p.rpartition(":")[0] != first.rpartition(":")[0]
    ]
    return f"{first}: {problem}" + (f" ({', '.join(others)})" if others else "")


def _generic(values: dict[str, Any], where: Where, notices: list[str]) -> RunConfig:
    fold_names(values, RENAMED)
    fold_type(values)
    values = drop_removed(values, GENERIC_FIELDS, where, notices)
    model_cfg = values.get("model_cfg")
    if isinstance(model_cfg, dict):
        model_cfg = values["model_cfg"] = dict(model_cfg)
        refuse_own_words(str(values.get("type")), [f"model_cfg.{k}" for k in model_cfg], "config")
        fold_names(model_cfg, ARCHITECTURE_ALIASES, "model_cfg.")
    problems = [unknown_key(k, where(k) or "config") for k in values if k not in GENERIC_FIELDS]
    problems += [
        f"{where(k) or 'config'}: required key '{k}' has no value. Set it: {k}=<value>"
        for k, v in values.items()
        if v == "???" and k in GENERIC_FIELDS
    ]
    known = {k: v for k, v in values.items() if k in GENERIC_FIELDS and v != "???"}
    if known.get("global_batch_size") is None:
        known["global_batch_size"] = _derived_batch(known)
    try:
        run = RunConfig.model_validate(known)
    except ValidationError as error:
        said = {"type"} if any("'type'" in p for p in problems) else set()
        problems += [p for key, p in explain(error, RunConfig, known, where) if key not in said]
    if problems:
        raise ConfigError(problems)
    run, problems = stated(run)
    _raise(problems, where)
    return run


def _derived_batch(values: Mapping[str, Any]) -> int:
    """Rows per step where a file states the micro-batch and its accumulation instead."""
    rows, steps = values.get("batch_size"), values.get("gradient_accumulation_steps")
    if not (type(rows) is int and type(steps) is int):
        return DEFAULT_GLOBAL_BATCH
    return rows * steps * world_size(values.get("num_gpus", "auto"), str(values.get("device", "auto")))


def _relations(run: RunConfig) -> list[str]:
    """Problems between generic fields."""
    problems = _batch(run) + _stages(run) + _schedule(run) + _machine(run) + _trackers(run)
    problems += load("kernels:problems")(run.kernels)
    if run.resume == "auto" and not (run.model_name or run.output_dir):
        problems.append("resume=auto needs model_name or output_dir, to know which run goes on")
    problems += _source(run)
    if run.base_model_lr and (own := load("trainer.optim:OPTIMIZERS")[run.optimizer].rate) != "learning_rate":
        problems.append(
            f"base_model_lr ({run.base_model_lr:g}) is one rate for all of a model, and optimizer={run.optimizer} has "
            f"two. Set learning_rate and {own} instead, or base_model_lr=0, which has all of it stay as it is"
        )
    if run.early_stopping and run.val_loss_every == 0:
        problems.append("early_stopping needs evaluations during training: val_loss_every is 0")
    for name in ("save_only_best", "save_best_model"):
        if getattr(run, name) and not run.save_checkpoint:
            problems.append(f"{name} needs save_checkpoint: true. Leave out one of the two")
    return problems


def _source(run: RunConfig) -> list[str]:
    from data import SOURCES, readers

    source = SOURCES[run.data]
    problems = [
        f"data={run.data} needs {need}"
        for need in source.needs
        if not any(getattr(run, name) for name in re.findall(r"(\w+)=", need))
    ]
    for field in ("input_file", "train_files", "dataset_name", "mix"):
        if getattr(run, field) and field not in source.reads:
            those = " or ".join(f"data={name}" for name in readers(field))
            way_out = (
                f"Add {those}" if run.data != "mix" else f"Drop {field}, or move it into an entry of mix"
            )
            problems.append(f"{field} is read by {those} only, and data is '{run.data}'. {way_out}")
    with_rows = [name for name, row in SOURCES.items() if "text_field" in row.reads]
    if run.training_mode == "instruction_finetuning" and run.data not in with_rows:
        problems.append(
            f"training_mode=instruction_finetuning learns from rows with turns, which data={run.data} does not have. "
            f"Set data to one of {', '.join(with_rows)}, or training_mode=pretraining"
        )
    fields = [run.text_field] if isinstance(run.text_field, str) else run.text_field
    if twice := [name for place, name in enumerate(fields) if name in fields[:place]]:
        problems.append(f"text_field names {twice[0]!r} twice. Name each field once")
    if run.data == "mix" and not run.packing:
        problems.append(
            "packing=false pads documents of one source, and data=mix joins several. Set packing=true"
        )
    return problems or (problems_alone(run, _source) if run.data == "mix" else [])


def _batch(run: RunConfig) -> list[str]:
    world = world_size(run.num_gpus, run.device)
    total, steps = run.global_batch_size, run.gradient_accumulation_steps or 1
    rows = run.batch_size if isinstance(run.batch_size, int) else 1
    unit = rows * steps * world
    both = isinstance(run.batch_size, int) and run.gradient_accumulation_steps is not None
    if total == unit or (not both and total % unit == 0):
        return []
    parts = [f"num_gpus ({world} processes)"] if world > 1 else []
    if isinstance(run.batch_size, int):
        parts.append(f"batch_size ({rows})")
    if run.gradient_accumulation_steps is not None:
        parts.append(f"gradient_accumulation_steps ({steps})")
    if both:
        return [
            f"global_batch_size ({total}) must equal {' * '.join(reversed(parts))} = {unit}. "
            f"Set global_batch_size={unit}, or null to derive it"
        ]
    near = [v for v in (total // unit * unit, (total // unit + 1) * unit) if v > 0]
    return [
        f"global_batch_size ({total}) must be divisible by {' * '.join(parts)} = {unit}; "
        f"nearest: {', '.join(map(str, near))}"
    ]


def _stages(run: RunConfig) -> list[str]:
    """Problems of `batch_stages`."""
    if run.batch_stages is None:
        return []
    ends, last = [stage.until for stage in run.batch_stages], run.batch_stages[-1]
    problems = []
    if any(a >= b for a, b in itertools.pairwise(ends)) or ends[-1] != 1:
        problems.append(
            f"batch_stages: until must rise from stage to stage and end at 1, got {', '.join(f'{e:g}' for e in ends)}"
        )
    if last.rows not in (None, run.global_batch_size):
        problems.append(
            f"batch_stages: the last stage has global_batch_size rows ({run.global_batch_size}), got {last.rows}. "
            f"Leave its rows out, or set global_batch_size={last.rows}"
        )
    given = run.batch_size if isinstance(run.batch_size, int) else 1
    if run.batch_size == "auto" and run.gradient_accumulation_steps is not None:
        given = max(
            1,
            run.global_batch_size // (run.gradient_accumulation_steps * world_size(run.num_gpus, run.device)),
        )
    unit = given * world_size(run.num_gpus, run.device)
    for rows in [stage.rows for stage in run.batch_stages if stage.rows and stage.rows % unit]:
        near = [v for v in (rows // unit * unit, (rows // unit + 1) * unit) if v > 0]
        problems.append(
            f"batch_stages: rows ({rows}) must be divisible by the rows of one micro-step of all processes, {unit}; "
            f"nearest: {', '.join(map(str, near))}"
        )
    return problems


def _schedule(run: RunConfig) -> list[str]:
    problems = []
    decay = (
        run.lr_decay_steps if "lr_decay_steps" in CHOICES["scheduler"].table[run.scheduler].reads else None
    )
    length = decay or (None if run.num_epochs else run.num_iterations)
    if run.warmup_ratio is None and length is not None and run.warmup_steps >= length:
        name = "lr_decay_steps" if decay else "num_iterations"
        problems.append(
            f"warmup_steps ({run.warmup_steps}) must be less than {name} ({length}). Nearest: "
            f"warmup_steps={length - 1}; or a part of the run, such as warmup_ratio=0.1"
        )
    if run.min_lr is not None and run.min_lr > run.learning_rate:
        problems.append(f"min_lr ({run.min_lr}) must not exceed learning_rate ({run.learning_rate})")
    return problems + _momentum(run)


def _momentum(run: RunConfig) -> list[str]:
    """Problems of a scheduled momentum."""
    ends, top = run.muon_momentum_ends, run.muon_momentum
    rise, fall = run.muon_momentum_rise, run.muon_momentum_fall
    if ends is None:
        return []
    problems = []
    if ends > top:
        problems.append(
            f"muon_momentum_ends ({ends}) must not exceed muon_momentum ({top}), which it rises to. Nearest: "
            f"muon_momentum_ends={top}"
        )
    if rise + fall > 1:
        problems.append(
            f"muon_momentum_rise ({rise}) and muon_momentum_fall ({fall}) must not exceed the whole run, 1, together. "
            f"Nearest: muon_momentum_fall={1 - rise:g}"
        )
    if rise + fall == 0:
        problems.append(
            "muon_momentum_ends has no effect while muon_momentum_rise and muon_momentum_fall are 0. Nearest: "
            "muon_momentum_ends=null"
        )
    return problems


def _machine(run: RunConfig) -> list[str]:
    problems = []
    on_cuda = uses_cuda(run.device)
    started = process_group()[1] if launched() else None
    if started is not None and run.num_gpus not in ("auto", started):
        plural = "es were" if started > 1 else " was"
        problems.append(
            f"num_gpus is {run.num_gpus} but {started} process{plural} started. "
            f"Use: torchrun --nproc_per_node={run.num_gpus} mytrainer.py ..."
        )
    if run.num_gpus not in ("auto", 1) and (run.device == "mps" or re.match(r"cuda:\d", run.device)):
        problems.append(f"num_gpus is {run.num_gpus} but device={run.device} is a single one")
    if run.ddp_backend == "nccl" and not on_cuda:
        problems.append(
            "ddp_backend: 'nccl' needs CUDA; on this device use gloo, or null to choose by device"
        )
    return problems


def _trackers(run: RunConfig) -> list[str]:
    """A tracker that was asked for and is not installed is found out now, not in the middle of the run."""
    return [
        f"{row.switch}: {row.needs} is not installed. pip install -e '.[{name}]', or set {row.switch}=false"
        for name, row in load("trainer.run:TRACKERS").items()
        if getattr(run, row.switch) and row.needs and find_spec(row.needs) is None
    ]


def _files(run: RunConfig) -> list[str]:
    """Problems with what the run is to read, found before anything starts."""
    from data.tokenizer_choice import choose

    problems = problems_alone(run, _text) if run.data == "mix" else []
    problems += [] if problems else _text(run)
    # A run that goes on does not read what it began from.
    if run.init_from_checkpoint and run.resume == "none":
        problems += [f"init_from_checkpoint: {p}" for p in [not_weights(Path(run.init_from_checkpoint))] if p]
    if run.resume not in ("none", "auto") and not Path(run.resume).exists():
        problems.append(f"resume: no such run or checkpoint: {run.resume}")
    if run.resume not in ("none", "auto") and Path(run.resume).is_file():
        problems.append(not_a_folder(run.resume))
    return problems + _problem(lambda: choose(run))


def _text(run: RunConfig) -> list[str]:
    """Problems with the files of a source."""
    from data import SOURCES

    source = SOURCES[run.data]
    path = Path(run.data_root or "", run.input_file) if run.input_file else None
    if path and not path.exists():
        return [f"input_file: no such file or folder: {path} (looked from {Path.cwd()})"]
    return _problem(lambda: load(source.absolute)(run)) if source.absolute else []


def _problem(look: Callable[[], object]) -> list[str]:
    """What a look says, at most one."""
    try:
        look()
    except ValueError as error:
        return [str(error)]
    return []


def _objective(run: RunConfig) -> list[str]:
    """Generic fields that not every objective has a use for."""
    if not run.z_loss or (adapter := load("adapters:adapter_class")(run)).takes_z_loss:
        return []
    return [
        f"z_loss ({run.z_loss}) belongs to a cross-entropy over all tokens, and {adapter.__name__} trains type "
        f"'{run.type}' on another objective. Nearest: z_loss=0"
    ]


def _masks(run: RunConfig, model_cfg: ModelConfig) -> list[str]:
    """Rows of which parts do not count, where the architecture takes none."""
    asked = [("training_mode", "instruction_finetuning", "pretraining"), ("packing", False, "true")]
    given = [row for row in asked if getattr(run, row[0]) == row[1]]
    if not given or not (why := load("adapters:adapter_class")(run).masks(model_cfg)):
        return []
    return [
        f"{name} ({str(value).lower()}) leaves out parts of a row, and type '{run.type}' cannot: {why}. Nearest: "
        f"{name}={nearest}"
        for name, value, nearest in given
    ]


def _adapted(run: RunConfig, model_cfg: ModelConfig) -> list[str]:
    """Problems of adapters beside weights that nobody has trained."""
    if not run.use_lora or run.init_from_checkpoint or run.resume != "none" or model_cfg.elsewhere:
        return []
    return [
        "use_lora adapts weights that were trained, and leaves them as they are: it needs "
        "init_from_checkpoint=<a run, or a folder of export or of Hugging Face transformers>"
    ]


def _tokens(run: RunConfig, model_cfg: ModelConfig) -> list[str]:
    """Problems between the tokenizer and what the architecture reads."""
    from data.tokenizer_choice import choose

    return _problem(lambda: choose(run, _unit(run, model_cfg)))


def _unit(run: RunConfig, model_cfg: ModelConfig) -> Any:
    """What the adapter says that the model reads."""
    import models

    adapter = _own_adapter(run.model_adapter or models.resolve(run.type).adapter, lambda key: "")
    return adapter.unit(model_cfg) if hasattr(adapter, "unit") else model_cfg.unit


def _own_adapter(spec: str, where: Where) -> Any:
    """The adapter that this names; None for the default one, which has no Cfg, says what the Config says, and would
    import torch."""
    import models

    return None if spec == models.Architecture.adapter else _imported("model_adapter", spec, where)


def architecture_config(type_: str, adapter: str | None, where: Where) -> type[ModelConfig]:
    """The Config class of an architecture: its adapter's own `Cfg`, else the model's `Config`."""
    import models

    try:
        architecture = models.resolve(type_)
    except ValueError as error:
        raise ConfigError(_placed(f"type: {error}", where)) from None
    own = getattr(_own_adapter(adapter or architecture.adapter, where), "Cfg", None)
    spec = architecture.model
    config_class = own or getattr(_imported("type", spec, where), "Config", None)
    if isinstance(config_class, type) and issubclass(config_class, ModelConfig):
        _refuse_taken_names(config_class, spec, where)
        return config_class
    message = f"type: {spec} has no class attribute `Config` derived from configs.schema.ModelConfig"
    raise ConfigError(_placed(message, where))


def _refuse_taken_names(config_class: type[ModelConfig], spec: str, where: Where) -> None:
    """A field called as a spelling of another could never be set: its name is read as that one."""
    taken = [
        f"'{n}' (read as {ARCHITECTURE_ALIASES[n]})"
        for n in config_class.model_fields
        if n in ARCHITECTURE_ALIASES
    ]
    if taken:
        message = f"type: the Config of {spec} calls a field {', '.join(taken)}. Give it a name of its own"
        raise ConfigError(_placed(message, where))


def _imported(field: str, spec: str, where: Where) -> Any:
    try:
        return load(spec)
    except (ImportError, ValueError) as error:
        why = str(error).removeprefix(f"'{spec}': ")
        raise ConfigError(
            _placed(f"{field}: cannot import '{spec}': {why}. Expected pkg.mod:Class on PYTHONPATH", where)
        ) from error


def _drop_preset_extras(
    run: RunConfig, config_class: type[ModelConfig], where: Where, notices: list[str]
) -> dict[str, Any]:
    """`model_cfg` without the sizes that a preset brought and this architecture has no counterpart for. What the
    command line says stays, though the preset says the same: it is an unknown key there."""
    # A run that goes on has the architecture that it has, whatever became of the file.
    if run.resume != "none" or not option_path("preset", run.preset).is_file():
        return run.model_cfg
    brought = read_option("preset", run.preset).values.get("model_cfg") or {}
    of_tokens = {"vocab_size"} if config_class.unit == "byte" else set()
    extras = {
        k
        for k, v in run.model_cfg.items()
        if (k not in config_class.model_fields or k in config_class.elsewhere or k in of_tokens)
        and brought.get(k, ...) == v
        and where(f"model_cfg.{k}") != "command line"
    }
    if extras & of_tokens:
        notices.append(
            f"preset {run.preset}: {run.type} reads bytes, whose vocabulary is its own; vocab_size left out"
        )
    # What it turns off is missed by nobody.
    told = config_class.own_sizes | config_class.elsewhere | of_tokens
    if missed := sorted(k for k in extras - told if brought[k]):
        notices.append(f"preset {run.preset}: {run.type} has no {', '.join(missed)}; left out")
    return {k: v for k, v in run.model_cfg.items() if k not in extras}


def _architecture(
    type_: str, config_class: type[ModelConfig], fields: dict[str, Any], where: Where
) -> ModelConfig:
    names = list(config_class.model_fields)
    problems: list[str] = []
    inner: list[str] = []  # fields of another architecture within it
    try:
        model_cfg = config_class.model_validate({k: v for k, v in fields.items() if k in names})
        inner = [f"model_cfg.{k}.{name}" for k, v in model_cfg if isinstance(v, dict) for name in v]
    except ValidationError as error:
        problems += [p for _, p in explain(error, config_class, fields, where, "model_cfg.")]
    for key in fields:
        if key not in names:
            if isinstance(fields[key], dict) and fields[key]:
                problems += _nested(type_, key, fields[key], names, where)
                continue
            place = where(f"model_cfg.{key}")
            hint = suggest_key(f"model_cfg.{key}", names, (*inner, *GENERIC_FIELDS))
            problems.append(
                f"{place + ': ' if place else ''}unknown key 'model_cfg.{key}' for type '{type_}'.{hint}"
            )
    if problems:
        raise ConfigError(problems)
    return model_cfg


def _nested(type_: str, section: str, inner: dict[str, Any], names: list[str], where: Where) -> list[str]:
    """What to write instead of a section that the architecture does not have: its fields are flat."""
    problems = []
    for name in inner:
        key, field = f"model_cfg.{section}.{name}", ARCHITECTURE_ALIASES.get(name, name)
        if field in names:
            said = f"the fields of type '{type_}' are flat: use model_cfg.{field}"
        elif name in GENERIC_FIELDS:
            said = f"it has moved: use the top-level field {name}"
        else:
            said = f"there is no such section.{suggest_key(f'model_cfg.{name}', names, GENERIC_FIELDS)}"
        place = where(key) or where(f"model_cfg.{section}")
        problems.append(f"{place + ': ' if place else ''}unknown key '{key}' for type '{type_}': {said}")
    return problems
