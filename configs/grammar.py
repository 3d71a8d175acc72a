"""Values in Hydra's grammar: reading what stands behind `key=`, and writing it so that Hydra reads the same."""

from __future__ import annotations

import math
import shlex
import types
import typing
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep
from hydra.errors import HydraException

from configs.messages import ConfigError
from configs.schema import GENERIC_FIELDS, RunConfig

_MOST_POINTS = 1_000_000  # of one range


def _parsed(text: str) -> Override:
    """HydraException also for what its grammar takes and Python does not."""
    try:
        return OverridesParser.create().parse_override(text)
    except ValueError:
        raise HydraException("a number has too many digits") from None
    except RecursionError:
        raise HydraException("nested too deep") from None


def parse_override(text: str) -> Override:
    """One `key=value`. ConfigError if Hydra's grammar has no place for the value."""
    try:
        return _parsed(text)
    except HydraException as error:
        key, _, value = text.lstrip("+").partition("=")
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"command line: {key}: cannot read the value {value!r} ({reason}). "
            f"Quote it twice, once for the shell: {in_quotes(key, value)}"
        ) from None


def word(key: str, value: object) -> str:
    """`key=value` as a word of our command line that means this text, in quotes where Hydra's grammar needs them."""
    text = str(value)
    try:
        parsed = _parsed(f"x={quoted(key, text)}")
        plain = not parsed.is_sweep_override() and parsed.value() == text
    except HydraException:
        plain = False
    escaped = text.replace('"', '\\"')
    return f"{key}={text}" if plain else f'{key}="{escaped}"'


def in_quotes(key: str, value: object) -> str:
    """The same as one types it in a shell."""
    return shlex.quote(word(key, value))


def refuse_endless(key: str, parsed: Override) -> None:
    """ConfigError for a range of which no list can be made."""
    value = parsed.value()
    if not isinstance(value, RangeSweep):
        return
    start, stop, step = (float(part or 0) for part in (value.start, value.stop, value.step))
    count = (stop - start) / step if step else math.inf
    if not abs(count) <= _MOST_POINTS:  # NaN neither
        many = f"about {abs(count):.3g}" if math.isfinite(count) else "no end of"
        given = (parsed.input_line or "").partition("=")[2]
        raise ConfigError(
            f"command line: {key}: {given} has {many} values; {_MOST_POINTS:,} at most "
            f"can stand in a sweep. {'A step that is not 0 is needed' if not step else 'Take a larger step'}"
        )


def override_choices(parsed: Override, available: list[str]) -> list[str]:
    """The names that a value means, a sweep's all."""
    value = parsed.value()
    if isinstance(value, ChoiceSweep):
        return [str(getattr(v, "text", v)) for v in value.list]  # a quoted one is an object
    if isinstance(value, Glob):
        return value.filter(available)
    return [str(value)]


def entries(key: str, value: str) -> list[tuple[str, str]] | None:
    """`{a: 1, b: x}` as (name, value) pairs in the same grammar; None where the value is no mapping."""
    if not value.lstrip().startswith("{"):
        return None
    found = parse_override(f"{key}={value}")
    mapping = found._value
    if not isinstance(mapping, dict):
        return None
    return [
        (str(getattr(name, "text", name)), found._get_value_element_as_str(item))
        for name, item in mapping.items()
    ]


def is_text(key: str) -> bool:
    """Whether a key of the command line takes any text: a comma in it may be meant."""
    return key.startswith("env.") or (key in GENERIC_FIELDS and str in field_types(key))


def quoted(key: str, value: str) -> str:
    """A value for a text field, quoted where Hydra's grammar would misread it as a number or not at all."""
    if not is_text(key) or value[:1] in ("'", '"') or value == "null" or value.startswith("${"):
        return value
    try:
        parsed = _parsed(f"x={value}")
        if parsed.is_sweep_override() or isinstance(parsed.value(), str):
            return value
        if key.startswith("env.") and isinstance(parsed.value(), list | dict):
            return value  # for the typed check to refuse
        if isinstance(parsed.value(), list) and key in GENERIC_FIELDS and _takes_lists(key):
            return value
    except HydraException:
        pass
    escaped = value.replace("\\'", "\\\\'").replace("'", "\\'")
    return f"'{escaped}'" if not escaped.endswith("\\") else value


def _takes_lists(field: str) -> bool:
    return any(typing.get_origin(kind) is list for kind in field_types(field))


def field_types(field: str) -> set[Any]:
    """The plain types that a generic field accepts."""

    def leaves(annotation: Any) -> set[Any]:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            return leaves(typing.get_args(annotation)[0])
        if origin in (typing.Union, types.UnionType):
            return set().union(*(leaves(a) for a in typing.get_args(annotation)))
        return {annotation}

    return leaves(RunConfig.model_fields[field].annotation)
