"""JSON Schema of our YAML files, for editors that complete and check them (`# yaml-language-server: $schema=...`).

It says what the typed configurations say: generic fields, their choices and ranges, and the fields of `model_cfg` by
`type`, or by the file of a type that `defaults` names. Relations between fields are left to the run.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema

import models
from configs.files import CONFIGS, EXTENSIONS, choices
from configs.frontend import GROUPS
from configs.messages import ARCHITECTURE_ALIASES, RENAMED
from configs.schema import CHOICES, RunConfig
from configs.validate import architecture_config

FILE = CONFIGS / "model.schema"  # no .json: such files here are sizes
HEADER = "# yaml-language-server: $schema="
_REF = "#/definitions/"
# What Hydra resolves, or a file over this one has to say.
_OPEN = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}
_SWITCH = {"type": "boolean"}
# What is read besides what the class holds in the end (its validators turn it).
_WIDER: dict[str, dict[str, Any]] = {
    "use_wandb": _SWITCH,
    "global_batch_size": {"type": "null"},
    "kernels": {"type": "string"},
    "env": {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}},
}


def schema() -> dict[str, Any]:
    """The whole of it. Imports every model."""
    classes = {name: architecture_config(name, None, lambda key: "") for name in models.ARCHITECTURES}
    wanted: list[type[BaseModel]] = [RunConfig, *dict.fromkeys(classes.values())]
    names, made = models_json_schema([(cls, "validation") for cls in wanted], ref_template=_REF + "{model}")
    definitions = {name: _readable(body) for name, body in made["$defs"].items()}
    run = definitions.pop(_name(names[RunConfig, "validation"]))
    fields = run["properties"]
    for field, mark in CHOICES.items():
        fields[field] = _named(fields[field], choices(field) if field in GROUPS else sorted(mark.table))
    fields["preset"] = {"enum": sorted({"auto", *choices("preset")})}
    fields["type"] = _type()
    fields["model_cfg"] = {"type": ["object", "null"]}
    for field, wider in _WIDER.items():
        fields[field] = {"anyOf": [wider, fields[field]]}
    _take_null(fields, RunConfig, {"type": "any"})
    fields |= {old: fields[new] for old, new in RENAMED.items()}
    entry = {"type": ["string", "object"], "additionalProperties": {"type": ["string", "null"]}}
    for name, cls in classes.items():
        body = definitions[_name(names[cls, "validation"])]
        _take_null(body["properties"], cls, {})
        own = models.ARCHITECTURES[name].own_words
        for old, new in ARCHITECTURE_ALIASES.items():
            if new in body["properties"] and old not in own:
                body["properties"][old] = body["properties"][new]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A model file, or an option of one",
        "type": "object",
        "properties": {"defaults": {"type": "array", "items": entry}}
        | {name: _open(field) for name, field in sorted(fields.items())},
        "additionalProperties": False,
        "allOf": [_of_type(name, _name(names[cls, "validation"])) for name, cls in classes.items()],
        "definitions": {"open": _OPEN}
        | {
            name: body | {"properties": {k: _open(v) for k, v in body["properties"].items()}}
            for name, body in sorted(definitions.items())
        },
    }


def text() -> str:
    """The same as it is written into `FILE`."""
    return _written(schema(), "") + "\n"


def _written(value: Any, indent: str) -> str:
    """As JSON, a field on each line."""
    deep = isinstance(value, dict) and not indent.startswith("   ")
    if not deep or not any(isinstance(inner, dict) for inner in value.values()):
        return json.dumps(value)
    lines = [f"{indent} {json.dumps(k)}: {_written(v, indent + ' ')}" for k, v in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def header(path: Path) -> str:
    """The line at the beginning of a YAML file in `configs/` or below by which editors find the schema."""
    up = "../" * (len(path.relative_to(CONFIGS).parts) - 1)
    return f"{HEADER}{up}{FILE.name}"


def _name(ref: dict[str, Any]) -> str:
    return str(ref["$ref"]).removeprefix(_REF)


def _readable(body: Any) -> Any:
    """A schema without titles and defaults, which say nothing that the files do not say, nothing being required: what
    a file leaves out stands in those that it builds on."""
    if isinstance(body, list):
        return [_readable(item) for item in body]
    if not isinstance(body, dict):
        return body
    kept = {k: v for k, v in body.items() if k not in ("title", "default", "description", "required")}
    return {
        k: {name: _readable(field) for name, field in v.items()} if k == "properties" else _readable(v)
        for k, v in kept.items()
    }


def _take_null(fields: dict[str, Any], cls: type[BaseModel], needed: dict[str, Any]) -> None:
    """Allow null, in place, where the class takes it though the field never holds it: what it stands for is worked
    out. `needed`: values without which the class takes nothing."""
    for name in cls.model_fields:
        null = {"type": "null"}
        with suppress(ValidationError):
            cls.model_validate({**needed, name: None})
            if null not in fields[name].get("anyOf", ()):
                fields[name] = {"anyOf": [fields[name], null]}


def _named(field: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A text field whose values are these."""
    return {**{k: v for k, v in field.items() if k != "type"}, "enum": names}


def _type() -> dict[str, Any]:
    """A name of the table, another word for one, or a class of somebody's own."""
    known = sorted(
        {*models.ARCHITECTURES, *(a for row in models.ARCHITECTURES.values() for a in row.aliases)}
    )
    return {"anyOf": [{"enum": known}, {"type": "string", "pattern": r"^[\w.]+[:.]\w+$"}]}


def _open(field: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [field, {"$ref": f"{_REF}open"}]}


def _of_type(name: str, definition: str) -> dict[str, Any]:
    """What `model_cfg` holds where a file is of this type, as it says, or as the file says that it builds on."""
    words = [name, *models.ARCHITECTURES[name].aliases]
    says = {"properties": {"type": {"enum": words}}, "required": ["type"]}
    files = [name, *(name + end for end in EXTENSIONS)]
    builds = {
        "not": {"required": ["type"]},
        "properties": {"defaults": {"contains": {"enum": files}}},
        "required": ["defaults"],
    }
    fields = {"anyOf": [{"$ref": _REF + definition}, {"type": "null"}]}
    return {"if": {"anyOf": [says, builds]}, "then": {"properties": {"model_cfg": fields}}}


def shipped() -> list[Path]:
    """The YAML files of this folder and below, but for those of other projects' forms."""
    found = (p for p in CONFIGS.rglob("*") if p.suffix in EXTENSIONS)
    return sorted(p for p in found if p.parent.name != "formats")
