"""What pydantic found wrong, said for people: the key, what is allowed, what was given."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import annotated_types as at
from pydantic import BaseModel, ValidationError

from naming import did_you_mean, not_one_of

# Words that YAML 1.1 reads as truth values, and nothing else does.
_SWITCHES = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_NAMES = {int: "int", float: "float", str: "str", bool: "bool", type(None): "null"}


def explain(
    error: ValidationError,
    model: type[BaseModel],
    values: Mapping[str, Any],
    where: Callable[[str], str],
    prefix: str = "",
) -> list[tuple[str, str]]:
    """One `(field, message)` per field that failed. `values` is what was given, `prefix` leads the key."""
    by_key: dict[str, list[Any]] = {}
    for item in error.errors():
        by_key.setdefault(_key(item["loc"], model), []).append(item)
    for key in [k for k in by_key if any(other.startswith(f"{k}.") for other in by_key)]:
        del by_key[key]  # pydantic leaves out wrong entries, and finds the rest too few
    messages = []
    for key, items in by_key.items():
        place = where(f"{prefix}{key}")
        text = _message(prefix, key, items, model, values)
        messages.append((key, f"{place}: {text}" if place else text))
    return messages


def _key(loc: tuple[Any, ...], model: type[BaseModel]) -> str:
    """The field, with the entry of a mapping or list behind it; pydantic's names of union members dropped."""
    if not loc:
        return ""
    field = model.model_fields.get(str(loc[0]))
    inside = field is not None and any(
        typing.get_origin(a) in (dict, list, tuple) or _models(a) for a in _leaves(field.annotation)
    )
    members = ("dict[", "list[", "tuple[", "literal[", "constrained-", "function-")
    rest = [str(p) for p in loc[1:] if inside and not str(p).startswith(members)]
    return ".".join([str(loc[0]), *rest])


def _message(
    prefix: str, key: str, items: list[Any], model: type[BaseModel], values: Mapping[str, Any]
) -> str:
    name, field_name = f"{prefix}{key}", key.partition(".")[0]
    kinds = {i["type"] for i in items}
    if "missing" in kinds:
        return f"required key '{name}' has no value. Set it: {name}=<value>"
    if kinds <= {"value_error", "assertion_error"} or field_name not in model.model_fields:
        return f"{name}: {items[0]['msg'].removeprefix('Value error, ')}" if name else items[0]["msg"]
    given = items[-1]["input"]
    if "extra_forbidden" in kinds:  # in a model within
        within, _, word = key.rpartition(".")
        (inner,) = _models(_declared(model, within)[0])
        return f"unknown key '{name}'.{did_you_mean(word, inner.model_fields)}"
    annotation, metadata = _declared(model, key)
    bounds = _bounds(annotation, metadata)
    if "finite_number" in kinds and not bounds:
        return f"{name}: must be a finite number, got {given}"
    if any(k.startswith(("greater_than", "less_than", "finite")) for k in kinds):
        return f"{name}: must satisfy {_range(key, bounds)}, got {given}"
    if "multiple_of" in kinds and isinstance(given, int):
        factor = next(i["ctx"]["multiple_of"] for i in items if i["type"] == "multiple_of")
        return f"{name}: must be a multiple of {factor}, got {given}; nearest: {max(1, round(given / factor)) * factor}"
    if "string_pattern_mismatch" in kinds:
        pattern = next(i["ctx"]["pattern"] for i in items if i["type"] == "string_pattern_mismatch")
        return f"{name}: {given!r} does not match {pattern}"
    if "string_unicode" in kinds:
        return f"{name}: {given!r} is not UTF-8 text. Where it is and the locale is not, set PYTHONUTF8=1"
    if of_length := next((i for i in items if i["type"] in ("too_short", "too_long")), None):
        least, most = (of_length["ctx"].get(bound) for bound in ("min_length", "max_length"))
        if most is not None or least > 1:
            wanted = f"at least {least}" if most is None else f"at most {most}"
            return f"{name}: must have {wanted} entries, got {len(given)}"
    if {"string_too_short", "too_short"} & kinds:
        return f"{name}: must not be empty"
    choices = _choices(annotation)
    if isinstance(given, str) and choices:
        others = [_NAMES[leaf] for leaf in _leaves(annotation) if leaf in _NAMES]
        return f"{name}: {not_one_of(given, [*choices, *others])}"
    hint = _left_out(model, key) if given is None else _hint(given, annotation)
    return f"{name}: expected {_expected(annotation)}, got {_shown(given)}{hint}"


def _left_out(model: type[BaseModel], key: str) -> str:
    """What a field is where nobody sets it, "" of what stands within one."""
    field = model.model_fields.get(key)
    default = None if field is None else field.get_default(call_default_factory=False)
    if isinstance(default, bool):
        default = "true" if default else "false"
    return f". Left out it is {default}" if isinstance(default, str | int | float) else ""


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _hint(value: Any, annotation: Any) -> str:
    if isinstance(value, float) and value.is_integer() and int in _leaves(annotation):
        return f". Write {int(value)}"
    if isinstance(value, str) and bool in _leaves(annotation) and value.lower() in _SWITCHES:
        return f". Write {_SWITCHES[value.lower()]}"
    if isinstance(value, str) and {int, float} & set(_leaves(annotation)):
        try:
            meant = f"{float(value):g}"
            return f". Write {meant} without quotes" if meant == value else f". Write {meant}"
        except ValueError:
            return ""
    return ""


def _leaves(annotation: Any) -> list[Any]:
    """Members of a union, without their constraints."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _leaves(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [leaf for a in typing.get_args(annotation) for leaf in _leaves(a)]
    return [annotation]


def _declared(model: type[BaseModel], key: str) -> tuple[Any, typing.Sequence[Any]]:
    """Annotation of a field, or of what stands within it, and its constraints."""
    name, *within = key.split(".")
    field = model.model_fields[name]
    annotation, metadata = field.annotation, typing.cast(typing.Sequence[Any], field.metadata)
    for part in within:
        if models := _models(annotation):
            annotation, metadata = (
                models[0].model_fields[part].annotation,
                models[0].model_fields[part].metadata,
            )
        elif any(typing.get_origin(leaf) in (dict, list, tuple) for leaf in _leaves(annotation)):
            annotation, metadata = _entry(annotation), []
    return annotation, metadata


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Those among the members of a union."""
    return [leaf for leaf in _leaves(annotation) if isinstance(leaf, type) and issubclass(leaf, BaseModel)]


def _entry(annotation: Any) -> Any:
    """What stands in a list, tuple or mapping."""
    inside = [
        [a for a in typing.get_args(leaf) if a is not ...][-1]
        for leaf in _leaves(annotation)
        if typing.get_origin(leaf) in (dict, list, tuple)
    ]
    return typing.Union[tuple(inside)]  # noqa: UP007


def _choices(annotation: Any) -> list[Any]:
    literals = (a for a in _leaves(annotation) if typing.get_origin(a) is typing.Literal)
    return [value for a in literals for value in typing.get_args(a)]


def _expected(annotation: Any) -> str:
    """`int or 'auto'`, `float or null`, `mapping`."""
    words = []
    for leaf in _leaves(annotation):
        origin = typing.get_origin(leaf)
        if origin is typing.Literal:
            words += [repr(v) for v in typing.get_args(leaf)]
        elif _models(leaf):
            words.append("mapping")
        else:
            words.append(
                {dict: "mapping", list: "list", tuple: "list"}.get(
                    origin or leaf, _NAMES.get(leaf, str(leaf))
                )
            )
    return " or ".join(words)


def _bounds(annotation: Any, metadata: typing.Sequence[Any]) -> list[Any]:
    """Every bound attached to the annotation or to a member of its union."""
    found = [m for m in metadata if isinstance(m, at.Ge | at.Gt | at.Le | at.Lt)]
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *extra = typing.get_args(annotation)
        # pydantic's Field keeps its bounds in `.metadata`
        flat = [m for e in extra for m in getattr(e, "metadata", [e])]
        return found + _bounds(inner, flat)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            found += _bounds(member, ())
    return found


def _range(name: str, bounds: list[Any]) -> str:
    """`0 <= dropout < 1` from the bounds of a field."""
    low = next((f"{m.ge} <= " for m in bounds if isinstance(m, at.Ge)), "")
    low = low or next((f"{m.gt} < " for m in bounds if isinstance(m, at.Gt)), "")
    high = next((f" <= {m.le}" for m in bounds if isinstance(m, at.Le)), "")
    high = high or next((f" < {m.lt}" for m in bounds if isinstance(m, at.Lt)), "")
    return f"{low}{name}{high}" if low or high else f"{name} finite"
