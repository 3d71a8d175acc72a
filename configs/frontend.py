"""The command line in our own spelling, turned into Hydra's.

Hydra's parser knows neither `--hydra_model_cfg` nor `--learning_rate 3e-4` nor `preset=tiny`. `parse`
sorts the words of a command line into model files, flags of Hydra and overrides; nothing is read from
disk here except the folder listing of `configs/`. Problems are collected, not raised one by one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import models
from configs import gpt_flags, trust
from configs.files import CONFIGS, FORMATS, ROOT, check_option, choices, options, words_of
from configs.grammar import (
    entries,
    field_types,
    in_quotes,
    is_text,
    override_choices,
    parse_override,
    quoted,
    refuse_endless,
)
from configs.hydra_words import (
    COMPLETION,
    FLAGS,
    MODE,
    RUN_DIR,
    VALUES,
    check_plugin,
    flags_together,
    is_setting,
    missing_program,
    mode_flag,
    unheeded,
)
from configs.messages import (
    ARCHITECTURE_ALIASES,
    MOVED,
    RENAMED,
    ConfigError,
    suggest_key,
)
from configs.paths import usable_paths
from configs.removed import REMOVED
from configs.request import Request
from configs.schema import GENERIC_FIELDS
from configs.unread import overruled
from naming import did_you_mean, expand_path, not_one_of

MODEL_FLAGS = ("hydra_model_cfg", "model", "config", "config-name", "cn")
COMMANDS = (
    "train",
    "generate",
    "eval",
    "compare",
    "export",
    "show",
    "convert",
    "schema",
    "bench",
    "doctor",
    "prepare",
)
GROUPS = ("preset", "data")
SWEEP_LIMIT = "sweep_limit"  # of a command, no field of a run
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
# Mappings whose keys are not generic fields: what may stand in them is checked later.
_OPEN = ("model_cfg", "env", "kernels")


def parse(argv: list[str]) -> Request:
    """Sort a command line. Never raises for a user's mistake: see `Request.problems`."""
    request = Request()
    if any(word in COMPLETION for word in argv):  # what follows is for the shell, no override
        request.flags.append(COMPLETION[1])
        request.overrides = [word for word in argv if word not in COMPLETION]
        return request
    words = list(argv)
    request.config_file = gpt_flags.config_file(words)
    while words:
        given, named = list(words), len(request.models)
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
        if len(request.models) == named:
            request.words.append(given[: len(given) - len(words)])
    _settle(request)
    return request


def _settle(request: Request) -> None:
    """What only the whole line can tell."""
    try:
        _config_file(request)
        request.values.update(usable_paths(request.values, lambda key: "command line"))
    except ConfigError as error:
        request.problems += error.problems
    if not request.multirun:
        request.problems += [_several(request, key) for key in sorted(request.sweeps)]
    request.problems += flags_together(request.flags) + _settings(request)
    if request.values.get("init_from_checkpoint") and request.values.get("resume") not in (None, "none"):
        request.problems.append(
            "command line: resume and init_from_checkpoint exclude each other: the first goes on with a run, the "
            "second begins one from weights alone. Leave one of them out"
        )
    both = {"batch_size", "gradient_accumulation_steps"}
    if both <= request.keys and not {"global_batch_size"} & request.keys:
        request.overrides.append("global_batch_size=null")  # the two asked for decide it
    request.overrides += [f"{winner}=null" for winner in overruled(request.keys)]


def _settings(request: Request) -> list[str]:
    """Problems of Hydra's settings, which a sweep heeds and a run, shown or started, does not."""
    as_run = request.mode == "run" or request.shows_job
    problems = unheeded(request.settings.items(), sweep=request.multirun or not as_run)
    if request.multirun and request.spelled.get("output_dir") == RUN_DIR:
        problems.append(
            f"command line: {RUN_DIR} is the folder of one run. Those of a sweep lie in hydra.sweep.dir=<folder>"
        )
    if request.sweep_limit is not None and not request.multirun:
        problems.append(f"command line: {SWEEP_LIMIT}: a run does not read it. It is for sweeps: add -m")
    if request.multirun and request.mode == "run":
        problems += missing_program(request.settings.get("hydra/launcher", ""))
    return problems


def _several(request: Request, key: str) -> str:
    """The problem of several values without -m. A comma in a text may simply belong to it."""
    value = request.written(key)
    meant = (
        f". If the comma belongs to the value, quote it twice, once for the shell: {in_quotes(key, value)}"
    )
    text = is_text(key) and "," in value and not value.endswith(")")
    return f"command line: {key} has several values for one run. Add -m to run them as a sweep" + meant * text


def _flag(request: Request, word: str, rest: list[str]) -> None:
    """One word that starts with a dash, taking its value from `rest` where it has one."""
    name, equals, value = word.partition("=")
    key = name.lstrip("-").replace("-", "_")
    if name in FLAGS:
        flag, takes = FLAGS[name]
        if takes and not equals:
            value = _next(name, rest)
        elif takes is None and not equals and rest and rest[0] in VALUES[flag]:
            value = rest.pop(0)
        if flag == "--info" and not value:
            value = "all"  # left out, Hydra would take the next word for it
        if value and value not in VALUES.get(flag, (value,)):
            raise ConfigError(f"command line: {flag}: {not_one_of(value, VALUES[flag])}")
        request.flags.append(f"{flag}={value}" if value else flag)
    elif name.lstrip("-") in MODEL_FLAGS or key in ("hydra_model_cfg", "config_name"):
        _model(request, name, value if equals else _next(name, rest))
    elif name in ("--config-path", "-cp"):
        request.config_path = value if equals else _next(name, rest)
    elif name in ("--config-dir", "-cd"):
        request.config_dir = value if equals else _next(name, rest)
        request.flags.append(f"--config-dir={request.config_dir}")
    elif key == gpt_flags.CONFIG_FILE:
        if not (value if equals else _next(name, rest)):
            raise ConfigError(f"command line: {name} needs a value: {name}=<file>")
    else:
        _generic_flag(request, name, key, value if equals else None, rest)


def _generic_flag(request: Request, name: str, key: str, value: str | None, rest: list[str]) -> None:
    """`--key=value`, `--key value`, and `--key` alone for a field that is true or false."""
    field = RENAMED.get(key, key)
    if (of_gpt := key in gpt_flags.NAMES) or key in gpt_flags.SIZES:
        value = _value(name, value, rest, switch=key in gpt_flags.SWITCHES)
        _gpt_flag(request, name, key, value, of_gpt)
        return
    if field not in (*GENERIC_FIELDS, SWEEP_LIMIT, trust.WORD) and field.split(".")[0] not in _OPEN:
        if value is None and rest and not rest[0].startswith("-") and "=" not in rest[0]:
            rest.pop(0)  # its value: one problem, not two
        if field in REMOVED or field in MOVED or ARCHITECTURE_ALIASES.get(field, field) in ARCHITECTURE_WORDS:
            raise ConfigError(unknown_key(field))
        names = (*GENERIC_FIELDS, "hydra_model_cfg", *sorted(gpt_flags.NAMES))
        hint = suggest_key(key, names, _ARCHITECTURE_PATHS)
        hint = hint.replace(" '", " '--")
        raise ConfigError(f"command line: unknown option {name}.{hint}")
    switch = field in GENERIC_FIELDS and bool in field_types(field)
    _override(request, f"{key}={_value(name, value, rest, switch=switch)}")


def _value(name: str, value: str | None, rest: list[str], *, switch: bool) -> str:
    """What an option is given, behind `=` or as the next word. `switch`: alone it is true."""
    if value is not None:
        return value
    follows = bool(rest) and not rest[0].startswith("--") and "=" not in rest[0]
    value = rest.pop(0) if rest and (follows or not switch) else ("true" if switch else "")
    if value == "":
        raise ConfigError(f"command line: {name} needs a value: {name}=<value>")
    return value


def _gpt_flag(request: Request, name: str, key: str, value: str, of_gpt: bool) -> None:
    """An option that GPT trainers have; `of_gpt`: and our fields have not."""
    if key in gpt_flags.SIZES and gpt_flags.is_size(request.config_file):
        request.notices.append(f"ignored {name} {value}: the architecture comes from {request.config_file}")
        return
    if key in gpt_flags.SIZES:
        request.gpt_sizes[key] = value
    try:
        words = gpt_flags.overrides(key, value) if of_gpt else [f"{key}={value}"]
    except ValueError as error:
        raise ConfigError(f"command line: {name}: {str(error).removeprefix(f'{key}: ')}") from None
    for word in words:
        _override(request, word, name if of_gpt else None)


def _config_file(request: Request) -> None:
    """The file of `--config_file`: the model, or where another is chosen, the size of that one."""
    given = request.config_file
    if not given:
        return
    if not request.models:
        _model(request, f"--{gpt_flags.CONFIG_FILE}", given)
    elif gpt_flags.is_size(given):
        request.claim("preset", f"--{gpt_flags.CONFIG_FILE}")
        request.values["preset"], chosen = _size(request, given)
        request.write("preset", f"configs/preset={chosen}")
    else:
        raise ConfigError(
            f"command line: --{gpt_flags.CONFIG_FILE}: {given} is a model file, and --hydra_model_cfg names one "
            "already. Leave one of them out, or give sizes in JSON"
        )


def as_gpt(request: Request) -> None:
    """Sizes without a model: a `gpt2`, and what is left out as GPT trainers have it."""
    request.models.append("gpt2")
    left_out = {key: value for key, value in gpt_flags.SIZES.items() if key not in request.gpt_sizes}
    for key, value in left_out.items():
        if key != "batch_size":
            _gpt_flag(request, f"--{key}", key, value, of_gpt=True)
    if not {"global_batch_size", "gradient_accumulation_steps"} & request.keys:
        rows = request.withdraw("batch_size") or gpt_flags.SIZES["batch_size"]
        _override(request, f"global_batch_size={rows}", "--batch_size")
    if "preset" not in request.values:
        _override(request, "preset=none")
    told = ", ".join(f"--{key} {value}" for key, value in left_out.items() if value != "null")
    request.notices.append("no model chosen: gpt2 of these sizes" + (f", with {told}" if told else ""))


def _model(request: Request, name: str, value: str) -> None:
    """One value of the flag that names model files."""
    if not value.strip(" ,'\""):
        raise ConfigError(
            f"command line: {name} names no model: its value is empty, as a shell variable that is not set leaves it"
        )
    request.models.append(value)


def _next(name: str, rest: list[str]) -> str:
    if not rest:
        raise ConfigError(f"command line: {name} needs a value: {name}=<value>")
    return rest.pop(0)


def _positional(request: Request, word: str) -> None:
    if Path(word).suffix in FORMATS:
        request.models.append(word)
        return
    if word in COMMANDS:
        raise ConfigError(f"command line: the command comes first: python mytrainer.py {word} ...")
    if Path(word).suffix:
        raise ConfigError(f"command line: cannot read '{Path(word).suffix}'. Accepted: {' '.join(FORMATS)}")
    raise ConfigError(
        f"command line: '{word}' is neither a command nor key=value nor a model file."
        + (f" The model: --hydra_model_cfg={word}" if word in options() else did_you_mean(word, COMMANDS))
    )


def _override(request: Request, word: str, spelled: str | None = None) -> None:
    """One `key=value` (with Hydra's prefixes + ++ ~), in canonical spelling. `spelled`: as it was written."""
    mark = word[: len(word) - len(word.lstrip("+~"))]
    key, _, value = word[len(mark) :].partition("=")
    if key in ("hydra_model_cfg", "model", "configs@_global_"):
        _model(request, key, value)
        return
    if is_setting(key):
        _setting(request, word, key, value)
        return
    if key == SWEEP_LIMIT:
        request.sweep_limit = _limit(value)
        return
    if key == trust.WORD:
        request.trust |= _trust(value)
        return
    spelled = spelled or key.removeprefix("configs/")
    key = _canonical(request, key)
    within = key.startswith("model_cfg.") and not mark.startswith("~")
    found = _entries(key, value) if key in _OPEN or within else None
    if found or (found is not None and key in _OPEN):  # nothing given for a field stays a value of it
        for name, item in found:
            _override(request, f"{mark}{key}.{name}={item}")
        return
    if key in _OPEN:
        raise ConfigError(
            f"command line: {key}: one mapping is meant, or {key}.<name>=<value>, got {value or 'nothing'}"
        )
    request.claim(key, spelled)
    if mark.startswith("~"):
        _deletion(request, key)
        return
    if key in GROUPS:
        _group(request, key, value)
        return
    if key == "type" and (meant := models.alias(value)) is not None:
        request.notices.append(f"'{value}' is read as '{meant[0]}'")
        value = meant[0]
        for word in words_of(meant[1]):
            _override(request, word)
    root, _, leaf = key.partition(".")
    known = key in GENERIC_FIELDS or (root in _OPEN and leaf)
    if not known:
        request.problems.append(unknown_key(key))
    prefix = "" if key in GENERIC_FIELDS else "++"
    parsed = parse_override(f"{prefix}{key}={quoted(key, value)}")
    if parsed.is_sweep_override():
        refuse_endless(key, parsed)
        request.sweeps.add(key)
    else:
        request.values[key] = parsed.value()
    request.write(key, parsed.input_line or "")


def _limit(value: str) -> int:
    """What `sweep_limit` says."""
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(
            f"command line: {SWEEP_LIMIT}: expected a number of points, 1 or more, got {value or 'nothing'}. Nearest: "
            f"{SWEEP_LIMIT}=1"
        )
    return int(value)


def _trust(value: str) -> frozenset[str]:
    """What `trust` says."""
    try:
        modules = trust.modules_of(value.strip("'\"[]").replace(" ", ""))
    except ValueError as error:
        raise ConfigError(f"command line: {error}") from None
    if not modules:
        raise ConfigError(f"command line: {trust.WORD}: expected the name of a module, got nothing")
    return modules


def _setting(request: Request, word: str, key: str, value: str) -> None:
    """One of Hydra's own."""
    if key == RUN_DIR:
        _override(request, f"output_dir={value}", RUN_DIR)
        return
    request.claim(key, key)
    if key == MODE:
        request.flags += mode_flag(value)
        return
    check_plugin(key, value)
    parse_override(word)
    request.settings[key] = value
    request.write(key, word)


def _entries(key: str, value: str) -> list[tuple[str, str]] | None:
    """`{name: value, ...}` of a mapping, and `V` of the field kernels, which means its default."""
    found = entries(key, value)
    return [("default", value)] if found is None and key == "kernels" else found


def _canonical(request: Request, key: str) -> str:
    if key in RENAMED:
        request.notices.append(f"'{key}' is read as '{RENAMED[key]}'")
        return RENAMED[key]
    if key.removeprefix("configs/") in GROUPS:
        return key.removeprefix("configs/")
    path, dot, leaf = key.rpartition(".")  # model_cfg.trunk_cfg.num_kv_heads too
    inside = path.partition(".")[0] == "model_cfg"
    return f"{path}.{ARCHITECTURE_ALIASES.get(leaf, leaf)}" if inside else key


def unknown_key(key: str, where: str = "command line") -> str:
    """The message for a key that is no generic field."""
    if key in REMOVED:
        return f"{where}: '{key}' is no longer a field: {REMOVED[key]}"
    root, _, leaf = key.partition(".")
    word = ARCHITECTURE_ALIASES.get(root, root)
    if word in ARCHITECTURE_WORDS and not leaf:
        return f"{where}: '{root}' is an architecture field here: set model_cfg.{word}"
    if key in MOVED:
        return f"{where}: '{key}' is an architecture field here: set model_cfg.{MOVED[key]}"
    return f"{where}: unknown key '{key}'.{suggest_key(key, GENERIC_FIELDS, _ARCHITECTURE_PATHS)}"


def _deletion(request: Request, key: str) -> None:
    root, _, leaf = key.partition(".")
    if key in GENERIC_FIELDS:
        raise ConfigError(f"command line: '{key}' is required and cannot be deleted. Set it: {key}=<value>")
    if root not in _OPEN or not leaf:
        raise ConfigError(unknown_key(key))
    request.write(key, f"~{key}")


def _group(request: Request, group: str, value: str) -> None:
    parsed = parse_override(f"configs/{group}={value}")
    names = override_choices(parsed, choices(group))
    if group == "preset" and any(Path(name).suffix == ".json" for name in names):
        names, chosen = map(list, zip(*(_size(request, name) for name in names), strict=True))
        parsed = parse_override(f"configs/{group}={','.join(chosen)}")
    else:
        for name in names if group != "preset" else [n for n in names if n != "auto"]:
            check_option(group, name, "command line")
    if len(names) > 1 or parsed.is_sweep_override():
        request.sweeps.add(group)
        if "auto" in names:
            raise ConfigError(
                "command line: preset=auto cannot stand in a sweep. Name the sizes, e.g. preset=nano"
            )
        request.write(group, parsed.input_line or "")
        request.values[group] = names
    else:
        request.values[group] = names[0]
        if names[0] != "auto":
            request.write(group, parsed.input_line or "")


def _size(request: Request, given: str) -> tuple[str, str]:
    """A preset as it is recorded, by its name or the path of its file, and as Hydra chooses it."""
    if Path(given).suffix != ".json":
        return given, given if given == "auto" else check_option("preset", given, "command line")
    try:
        path = expand_path(given)
    except ValueError as error:
        raise ConfigError(f"command line: preset: {error}") from None
    tried = [Path(os.path.abspath(base / path)) for base in (Path.cwd(), ROOT)]
    found = next((t for t in tried if t.is_file()), None)
    if found is None:
        raise ConfigError(
            f"command line: preset: no such file: {given} (tried {' and '.join(map(str, tried))})."
            + did_you_mean(path.stem, choices("preset"))
        )
    if found.parent == CONFIGS:
        return found.stem, found.stem
    stem = name = re.sub(r"[^A-Za-z0-9_-]+", "_", found.stem) or "size"
    number = 1
    while name in options("preset") or request.sizes.get(name, found) != found:
        number += 1
        name = f"{stem}-{number}"
    request.sizes[name] = found
    return str(found), name
