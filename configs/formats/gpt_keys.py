"""The keys of GPT trainers in our names, for the formats that state them: `.config` directives and Python assignments.

Keys are turned one by one, whatever else a file says, so that a file that builds on another may change any of them.
Only the rows of a step come from two: `batch_size` times `gradient_accumulation_steps` (1) is `global_batch_size`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from configs.messages import ARCHITECTURE_ALIASES, ConfigError, suggest_key
from configs.schema import GENERIC_FIELDS, PATHS
from naming import nearest, not_one_of, suggestion

Fields = dict[str, Any]  # our fields, dotted -> value
ROWS = {"batch_size": None, "gradient_accumulation_steps": 1}  # what each is where no file states it


@dataclasses.dataclass(frozen=True)
class Stated:
    """One entry of a file. `section`: its directive, "" where a format has none."""

    section: str
    key: str
    value: Any
    line: int


@dataclasses.dataclass
class Turned:
    """A file in our names."""

    values: dict[str, Any]
    lines: dict[str, int]  # dotted key -> line
    notices: list[str]
    rows: dict[str, Any]  # `ROWS`, as far as this file and its parents state them


def _to(*fields: str) -> Callable[[Any], Fields]:
    return lambda value: dict.fromkeys(fields, value)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value


def _one_of(field: str, words: Mapping[str, Any]) -> Callable[[Any], Fields]:
    def turned(value: Any) -> Fields:
        if not isinstance(value, str) or value not in words:
            raise ValueError(not_one_of(value, words))
        return {field: words[value]}

    return turned


def _dataset(value: Any) -> Fields:
    if not isinstance(value, str) or not value.strip(".") or "/" in value or "\\" in value:
        raise ValueError(f"the name of a folder in data/ is meant, got {value!r}")
    return {"data": "bin", "train_files": f"data/{value}/train*.bin", "val_files": f"data/{value}/val*.bin"}


def _start(value: Any) -> Fields:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected scratch, resume, or a folder of weights, got {value!r}")
    weights = None if value in ("scratch", "resume") else value
    return {"resume": "auto" if value == "resume" else "none", "init_from_checkpoint": weights}


def _strategy(value: Any) -> Fields:
    if value != "ddp":
        raise ValueError(f"{value!r} is not offered: processes go by ddp, which needs no field")
    return {}


def _block(value: Any) -> Fields:
    return {"train_seq_len": value, "val_seq_len": None, "model_cfg.n_ctx": value}


def _kept(value: Any) -> Fields:
    return {"save_checkpoint": True, "save_only_best": not _switch(value)}


# Directive -> key -> our fields.
TABLE: dict[str, dict[str, Callable[[Any], Fields]]] = {
    "MODEL": {
        "type": _to("type"),
        "n_layer": _to("model_cfg.n_layers"),
        "n_head": _to("model_cfg.n_heads"),
        "n_embd": _to("model_cfg.d_model"),
        "dropout": _to("model_cfg.dropout"),
        "bias": _to("model_cfg.bias"),
        "vocab_size": _to("model_cfg.vocab_size"),
        "block_size": _block,
        "use_rope": _to("model_cfg.use_rope"),
        "use_rmsnorm": _to("model_cfg.use_rmsnorm"),
        "use_swiglu": _to("model_cfg.use_swiglu"),
    },
    "DATA": {
        "dataset": _dataset,
        "batch_size": _to(),  # of both together, see `_settle_rows`
        "gradient_accumulation_steps": _to(),
        "block_size": _block,
    },
    "TRAIN": {
        "learning_rate": _to("learning_rate"),
        "weight_decay": _to("weight_decay"),
        "max_iters": _to("num_iterations"),
        "beta1": _to("adam_beta1"),
        "beta2": _to("adam_beta2"),
        "grad_clip": _to("max_grad_norm"),
        "init_from": _start,
    },
    "LR_SCHEDULE": {
        "decay_lr": lambda value: {"scheduler": "cosine" if _switch(value) else "constant"},
        "warmup_iters": lambda value: {"warmup_steps": value, "warmup_ratio": None},  # the ratio would win
        "lr_decay_iters": _to("lr_decay_steps"),
        "min_lr": _to("min_lr"),
    },
    "SYSTEM": {
        "device": _to("device"),
        "seed": _to("seed"),
        "dtype": _one_of("mixed_precision", {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}),
        "compile": _to("torch_compile"),
    },
    "LOGGING": {
        "out_dir": _to("output_dir"),
        "eval_interval": _to("val_loss_every"),
        "log_interval": _to("logging_steps"),
        "eval_iters": _to("val_steps"),
        "always_save_checkpoint": _kept,
        "eval_only": _to("eval_only"),
        "wandb_log": _to("use_wandb"),
        "wandb_project": _to("wandb_project"),
        "wandb_run_name": _to("wandb_run_name"),
    },
    "DDP": {"backend": _to("ddp_backend"), "strategy": _strategy, "num_gpus": _to("num_gpus")},
}
# Words of an architecture for a field of its own that in every other one are the context.
_OWN_WORDS = {("bd3lm", "block_size"): "block_length"}
# How a parent divides its steps, and how their size changes, is for its own batch size.
WHOLE_STEPS = {"batch_size": "auto", "gradient_accumulation_steps": None, "batch_stages": None}
WORDS = {key: section for section, keys in TABLE.items() for key in keys}  # block_size: DATA


def turn(
    entries: list[Stated],
    type_: str,
    own: frozenset[str] | None,
    inherited: Mapping[str, Any],
    where: str,
) -> Turned:
    """A file in our names. `type_`: the architecture that it is of in the end, `own` the names of that one's fields
    (None: not known); `inherited`: `ROWS` of what it builds on. Raises ConfigError with all problems."""
    turned = Turned({"type": type_, "model_cfg": {}}, {}, [], {**ROWS, **inherited})
    owners: dict[str, Stated] = {}  # key with its directive, or our field -> what set it
    rows: list[Stated] = []
    problems = []
    for entry in entries:
        place = f"{where}:{entry.line}"
        try:
            _claim(owners, f"{entry.section} {entry.key}", entry)
            fields = _fields(entry, type_, own)
            for field in fields:
                _claim(owners, field, entry)
            _refuse_marks(entry.value)
            if entry.key in ROWS and entry.section in ("", "DATA"):
                turned.rows[entry.key] = _count(entry)
                rows.append(entry)
            for field, value in fields.items():
                _put(turned.values, field, value)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        turned.lines |= dict.fromkeys(fields, entry.line)
        turned.notices += [n for f, v in fields.items() for n in _leads_away(f, v, f"{place}: {entry.key}")]
    turned.values["type"] = type_
    if rows and not problems:
        problems += _settle_rows(turned, rows[-1], owners.get("global_batch_size"), where)
    if problems:
        raise ConfigError(problems)
    return turned


def _settle_rows(turned: Turned, last: Stated, other: Stated | None, where: str) -> list[str]:
    """State the rows of a step; the problem where they are not known, or stated by another key too."""
    place, (rows, steps) = f"{where}:{last.line}", (turned.rows[name] for name in ROWS)
    if other:
        return [f"{place}: '{last.key}' sets global_batch_size, as '{other.key}' on line {other.line} does"]
    if rows is None:
        return [
            f"{place}: gradient_accumulation_steps means nothing without batch_size, which no file states"
        ]
    turned.values |= {"global_batch_size": rows * steps, **WHOLE_STEPS}
    turned.lines |= dict.fromkeys(("global_batch_size", *WHOLE_STEPS), last.line)
    return []


def _claim(owners: dict[str, Stated], name: str, entry: Stated) -> None:
    """ValueError where something else in the file already stands for this key or field."""
    other = owners.setdefault(name, entry)
    if other is entry:
        return
    if (other.section, other.key) == (entry.section, entry.key):
        raise ValueError(f"'{entry.key}' was already set on line {other.line}")
    raise ValueError(
        f"'{entry.key}' sets {name}, as '{other.key}' on line {other.line} does. Keep one of them"
    )


def _fields(entry: Stated, type_: str, own: frozenset[str] | None) -> Fields:
    """What one entry means. ValueError where it means nothing."""
    section, key, value = entry.section, entry.key, entry.value
    if section == "ENV":
        return {f"env.{key}": value}
    if section == "ADVANCED":
        return {_advanced(key, own): value}
    if section == "MODEL" and (field := _own_field(key, type_, own)):
        return {f"model_cfg.{field}": value}
    section = section or WORDS.get(key, "")
    if key not in TABLE.get(section, {}):
        raise ValueError(_unknown(entry, own))
    try:
        fields = TABLE[section][key](value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if key == "block_size" and own is not None and "n_ctx" not in own:
        del fields["model_cfg.n_ctx"]  # its rows are as long as they are
    return fields


def _own_field(key: str, type_: str, own: frozenset[str] | None) -> str:
    """The architecture's field of this name under MODEL, "" if it has none."""
    if word := _OWN_WORDS.get((type_, key)):
        return word
    root, dot, rest = key.partition(".")
    if own is None:  # whatever the table does not know is for the class outside to judge
        return (
            ""
            if root in TABLE["MODEL"] or root in WORDS
            else ARCHITECTURE_ALIASES.get(root, root) + dot + rest
        )
    known = root in own or (root not in TABLE["MODEL"] and ARCHITECTURE_ALIASES.get(root) in own)
    return (root if root in own else ARCHITECTURE_ALIASES[root]) + dot + rest if known else ""


def _advanced(key: str, own: frozenset[str] | None) -> str:
    """Our field of this name under ADVANCED."""
    root = key.partition(".")[0]
    if root == "env":
        raise ValueError(f"'{key}' belongs under ENV, not ADVANCED")
    if key in WORDS:
        raise ValueError(f"'{key}' belongs under {WORDS[key]}, not ADVANCED")
    if root in (own or ()):
        return f"model_cfg.{key}"
    if root in GENERIC_FIELDS and key != "model_cfg":
        inner = key.removeprefix("model_cfg.")
        return f"model_cfg.{ARCHITECTURE_ALIASES.get(inner, inner)}" if root == "model_cfg" else key
    if own is None and root != "model_cfg":
        return f"model_cfg.{key}"
    raise ValueError(
        f"unknown key '{key}'.{suggest_key(key, GENERIC_FIELDS, [f'model_cfg.{k}' for k in own or ()])}"
    )


def _unknown(entry: Stated, own: frozenset[str] | None) -> str:
    """What to say of a key that its directive does not have, or that no file has."""
    key, section = entry.key, entry.section
    if section and key in WORDS:
        return f"'{key}' belongs under {WORDS[key]}, not {section}"
    if section and key in GENERIC_FIELDS:
        return (
            f"'{key}' belongs under ADVANCED, not {section}"
            if key not in _OURS
            else (f"unknown key '{key}'. This format calls it {WORDS[_OURS[key]]} {_OURS[key]}")
        )
    known = {*(TABLE[section] if section else WORDS), *((own or ()) if section == "MODEL" else ())}
    near = [_OURS[key]] if key in _OURS else nearest(key, sorted(known))
    return f"unknown key '{key}'.{suggestion(near)} Known: {', '.join(sorted(known))}"


def _count(entry: Stated) -> int:
    if type(entry.value) is not int:
        raise ValueError(f"{entry.key}: expected int, got {entry.value!r} ({type(entry.value).__name__})")
    if entry.value < 1:
        raise ValueError(f"{entry.key}: must satisfy {entry.key} >= 1, got {entry.value}. Nearest: 1")
    return entry.value


def _refuse_marks(value: Any) -> None:
    """ValueError for text that our own files would not take as it is."""
    inner = (
        [*value, *value.values()]
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else [value]
    )
    for item in inner:
        if isinstance(item, list | dict):
            _refuse_marks(item)
        elif isinstance(item, str) and ("${" in item or item == "???"):
            raise ValueError(f"{item!r}: '${{' and '???' have a meaning in YAML files and none here")


def _put(values: dict[str, Any], field: str, value: Any) -> None:
    *path, leaf = field.split(".")
    for part in path:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{field}: {part} is {inner!r} already, which has no {leaf}")
        values = inner
    values[leaf] = value


def _leads_away(field: str, value: Any, place: str) -> list[str]:
    """A remark on each path that leaves the folder in which the run is started."""
    paths = value if isinstance(value, list) else [value]
    away = [p for p in paths if isinstance(p, str) and (p.startswith(("/", "~")) or ".." in p.split("/"))]
    return [f"{place} leads to {os.path.abspath(os.path.expanduser(p))}" for p in away if field in PATHS]


# Our field -> what these formats call it.
_OURS: dict[str, str] = {
    "num_iterations": "max_iters",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "max_grad_norm": "grad_clip",
    "scheduler": "decay_lr",
    "warmup_steps": "warmup_iters",
    "lr_decay_steps": "lr_decay_iters",
    "mixed_precision": "dtype",
    "torch_compile": "compile",
    "output_dir": "out_dir",
    "val_loss_every": "eval_interval",
    "logging_steps": "log_interval",
    "val_steps": "eval_iters",
    "use_wandb": "wandb_log",
    "ddp_backend": "backend",
    "init_from_checkpoint": "init_from",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "d_model": "n_embd",
    "n_ctx": "block_size",
}
