"""YAML files of three sections, `model:`, `memory:` and `training:`, in which memories are described elsewhere.

    model: {hidden_dim: 768, num_layers: 12}
    memory: {num_memory_tokens: 4096, use_chapters: true, num_chapters: 16}
    training: {max_steps: 50000, memory_lr: 1.0e-4}

It is a `memory_adapter` where `base_model_name` is set, else a `memory`. Keys that it leaves out are those of
`memory_sections.yaml`. Every key may also be spelled as our field is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from configs.messages import ARCHITECTURE_ALIASES, ConfigError
from configs.schema import GENERIC_FIELDS, OpenFraction, Rate
from models import MEMORY_ALIASES
from naming import did_you_mean, nearest, not_one_of, suggestion

Fields = dict[str, Any]  # our fields, dotted -> value
Sections = dict[str, dict[str, Any]]
SECTIONS = ("model", "memory", "training")
DEFAULTS = Path(__file__).with_name("memory_sections.yaml")
_SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD")
SPELLINGS = {**ARCHITECTURE_ALIASES, **MEMORY_ALIASES}
# Fields of a run that the sections say.
_NOT_HERE = {"type", "model_cfg", "model_adapter", "preset"}


def _to(*fields: str) -> Callable[[Any], Fields]:
    return lambda value: dict.fromkeys(fields, value)


def _strategy(value: Any) -> Fields:
    if value == "fsdp":
        raise ValueError("fsdp is not offered: every process holds the whole model. Nearest: ddp")
    if value != "ddp":
        raise ValueError(not_one_of(value, ("ddp",)))
    return {}


def _sharding(value: Any) -> Fields:
    if value not in _SHARDING:
        raise ValueError(not_one_of(value, _SHARDING))
    return {}


def _resume(value: Any) -> Fields:
    return {"resume": "none" if value is None else value}


# Section -> key -> our fields. Other keys of `model` and `memory` are fields of model_cfg (`SPELLINGS`), of `training`
# fields of a run.
TABLE: dict[str, dict[str, Callable[[Any], Fields]]] = {
    "model": {"tokenizer_name": lambda value: {"tokenizer": "auto" if value is None else value}},
    "memory": {name: _to(name) for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")},
    "training": {
        "max_length": lambda value: {"train_seq_len": value, "val_seq_len": None},
        "max_steps": _to("num_iterations"),
        "eval_steps": _to("val_loss_every"),
        "log_to_wandb": _to("use_wandb"),
        "resume_from_checkpoint": _resume,
        "distributed_strategy": _strategy,
        "fsdp_sharding_strategy": _sharding,
    },
}
# Files without a base may say how one would be held, and files with one what it decides by itself.
_OF_A_BASE: dict[str, Any] = {
    "base_model_name": None,
    "base_model_revision": str | None,
    "freeze_base_model": bool,
}
_DECIDED: dict[str, Any] = {
    "use_rope": bool,
    "rope_theta": Rate,
    "attention_dropout": OpenFraction,
    "tie_embeddings": bool,
}
# Those of a base.
_SIZES = {"vocab_size", "d_model", "n_heads", "n_kv_heads", "n_layers", "ffn_hidden", "n_ctx"}
# Read together, by `_modes`.
_MODES = ("vanilla_mode", "use_memory_adapter", "use_lora", "use_both_memory_and_lora")
# The splits of a data set that a file names; those of `memory_sections.yaml` are of the one there.
_SPLITS = {"dataset_split": "train", "eval_split": "test"}


def is_sections(values: Mapping[str, Any]) -> bool:
    """Whether a YAML file is one of these."""
    here = any(isinstance(values.get(name), dict) for name in SECTIONS)
    return here and not values.keys() & {"defaults", "model_cfg", "type"}


def type_of(values: Mapping[str, Any]) -> str:
    """The architecture that such a file is of."""
    model = values.get("model")
    on_a_base = isinstance(model, dict) and model.get("base_model_name") is not None
    return "memory_adapter" if on_a_base else "memory"


def turn(
    values: Mapping[str, Any], lines: Mapping[str, int], own: frozenset[str], where: str
) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Such a file in our names, the lines that they come from (dotted key -> line), and remarks. `own`: the fields of
    its type; `where`: the path as people know it. Raises ConfigError with all problems of the file."""
    problems = [
        f"{where}:{lines.get(name, 1)}: {name} is no section. There are model, memory and training, and nothing beside "
        f"them.{did_you_mean(name, SECTIONS)}"
        for name in values
        if name not in SECTIONS
    ]
    problems += [
        f"{where}:{lines.get(name, 1)}: {name}: keys and their values are meant, got {values[name]!r}"
        for name in SECTIONS
        if not isinstance(values.get(name) or {}, dict)
    ]
    if problems:
        raise ConfigError(problems)
    type_ = type_of(values)
    stated: Sections = {name: dict(values.get(name) or {}) for name in SECTIONS}
    fields = _of_defaults(stated, own, type_)
    owners: dict[str, str] = {}  # our field -> the key that set it
    places: dict[str, int] = {}
    notices = []
    for section, key, value in _entries(stated):
        line = lines.get(f"{section}.{key}", 1)
        try:
            if type_ == "memory_adapter" and section == "model" and key in _DECIDED:
                _require(_DECIDED[key], value)
                _require_of_the_base(key, value, stated["model"])
                notices.append(f"{where}:{line}: {key} is the base's, which decides it")
                continue
            meant = _fields(section, key, value, own)
            if key == "tokenizer_name" and value == stated["model"].get("base_model_name"):
                meant["tokenizer"] = "auto"  # the base's own, by its name
        except ValueError as error:
            problems.append(f"{where}:{line}: {section}.{key}: {error}")
            continue
        for field in meant:
            if (other := owners.setdefault(field, key)) != key:
                problems.append(
                    f"{where}:{line}: '{key}' sets {field}, as '{other}' does on line {places[field]}. Keep one of them"
                )
        fields |= meant
        places |= dict.fromkeys(meant, line)
    try:
        fields |= _modes({**defaults()["memory"], **stated["memory"]}, own)
    except ValueError as error:
        problems.append(f"{where}:{lines.get('memory', 1)}: memory: {error}")
    if problems:
        raise ConfigError(problems)
    return _nested({"type": type_, **fields}), places, notices


@functools.cache
def defaults() -> Sections:
    """`memory_sections.yaml`. Not to be changed."""
    found: Any = OmegaConf.to_container(OmegaConf.load(DEFAULTS))
    return found


def _entries(sections: Sections) -> Iterator[tuple[str, str, Any]]:
    for section in SECTIONS:
        for key, value in sections[section].items():
            if section != "memory" or key not in _MODES:
                yield section, key, value


def _of_defaults(stated: Sections, own: frozenset[str], type_: str) -> Fields:
    """Those of the type, of what a file does not state: on a base no sizes, which are the base's."""
    fields: Fields = {
        "batch_stages": None,
        "global_batch_size": None,
    }  # the rows of a step follow from two others
    for section, key, value in _entries(defaults()):
        of_base = type_ == "memory_adapter" and SPELLINGS.get(key, key) in _SIZES
        if section == "training" or key in TABLE[section] or (_own_field(key, own) and not of_base):
            fields |= _fields(section, key, value, own)
    return fields | (_SPLITS if "dataset_name" in stated["training"] else {})


def _own_field(key: str, own: frozenset[str]) -> str:
    """The field of the architecture that a key of `model` or `memory` means, "" where it has none."""
    name = SPELLINGS.get(key, key)
    return name if name in own else ""


def _home(key: str) -> str:
    """The section of a key, in either spelling, "" of one that is in none."""
    meant = SPELLINGS.get(key, key)
    for section, entries in defaults().items():
        if meant in (SPELLINGS.get(name, name) for name in entries):
            return section
    return "training" if key in GENERIC_FIELDS and key not in _NOT_HERE else ""


def _require_of_the_base(key: str, value: Any, model: Fields) -> None:
    """ValueError where a value is another than that of the base, if that is here and says it."""
    from models.memory.pretrained import base_folder, decided, lacking, read_config

    named, revision = model["base_model_name"], model.get("base_model_revision")
    if not isinstance(named, str) or not isinstance(revision, str | None) or lacking(named, revision):
        return
    folder = base_folder(named, revision)
    assert folder is not None
    its = decided(read_config(folder))
    if key == "attention_dropout" and value == 0 and model.get("freeze_base_model", True):
        return  # nothing is drawn in a base that stays as it is
    if key in its and its[key] != value:
        shown = str(its[key]).lower() if isinstance(its[key], bool) else its[key]
        raise ValueError(f"it must be that of {named}, {shown}, got {value!r}: leave it out")


def _require(kind: Any, value: Any) -> None:
    """ValueError unless a value is of a kind."""
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ValueError(f"{problem[0].lower()}{problem[1:]}, got {value!r}") from None


def _fields(section: str, key: str, value: Any, own: frozenset[str]) -> Fields:
    """What one entry means. ValueError where it means nothing."""
    if isinstance(value, str) and ("${" in value or value == "???"):
        raise ValueError(f"{value!r}: '${{' and '???' have a meaning in our YAML files and none here")
    if (home := _home(key)) not in ("", section):
        raise ValueError(f"it belongs under {home}")
    if turned := TABLE[section].get(key):
        return turned(value)
    if section == "training" and key in GENERIC_FIELDS and key not in _NOT_HERE:
        return {key: value}
    if section != "training" and (field := _own_field(key, own)):
        return {f"model_cfg.{field}": value}
    if section == "model" and key in _OF_A_BASE:
        _require(_OF_A_BASE[key], value)
        return {}
    known = {*TABLE[section], *(GENERIC_FIELDS if section == "training" else {*own, *SPELLINGS})}
    raise ValueError(f"unknown key.{suggestion(nearest(key, sorted(known - _NOT_HERE)))}")


def _modes(memory: Mapping[str, Any], own: frozenset[str]) -> Fields:
    """What is trained, of the four switches together. ValueError where they contradict each other."""
    for name in _MODES:
        if not isinstance(memory[name], bool):
            raise ValueError(f"{name}: expected true or false, got {memory[name]!r}")
    vanilla, with_memory, lora, both = (memory[name] for name in _MODES)
    if both and vanilla:
        raise ValueError(
            "use_both_memory_and_lora and vanilla_mode contradict each other. Leave out one of the two"
        )
    if both and not with_memory:
        raise ValueError(
            "use_both_memory_and_lora needs the memory. Set use_memory_adapter: true, or leave it out"
        )
    if lora and with_memory and not vanilla and not both:
        raise ValueError(
            "use_lora is adapters alone, and there is a memory besides. Set use_both_memory_and_lora: true, or "
            "use_memory_adapter: false"
        )
    fields = {"use_lora": lora or both}
    return fields | ({"model_cfg.vanilla_mode": vanilla or not with_memory} if "vanilla_mode" in own else {})


def _nested(fields: Fields) -> dict[str, Any]:
    """Dotted fields as a file of ours has them."""
    values: dict[str, Any] = {"type": fields["type"], "model_cfg": {}}
    for field, value in fields.items():
        root, _, leaf = field.rpartition(".")
        (values[root] if root else values)[leaf] = value
    return values
