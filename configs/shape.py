"""What holds of the values of a file before their types are checked.

Which run a file means, which preset and which architecture is asked before the typed check: what is asked for must be
one value by then, and a mapping where fields stand within.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_origin

from pydantic import BaseModel

from configs.grammar import field_types
from configs.schema import GENERIC_FIELDS, PATHS

_OPEN = ("model_cfg", "env", "match", "budget")  # fields with fields within


def misshapen(values: Mapping[str, Any], where: Callable[[str], str], *, resolved: bool) -> Iterator[str]:
    """Problems of generic fields, each at the place that `where` knows of a key. `resolved`: whether a `${...}` is the
    text that it looks like."""
    for name, value in values.items():
        if value is None or name not in GENERIC_FIELDS:
            continue
        text = isinstance(value, str)
        if name in _OPEN and not isinstance(value, Mapping) and (resolved or not (text and "${" in value)):
            expected = "mapping"
        elif isinstance(value, list | Mapping) and not _takes(name):
            expected = "one value"
        elif name in PATHS and not text and not _takes(name):
            expected = "text"
        else:
            continue
        place = where(name)
        hint = f". In quotes it is text: '{value}'" if type(value) in (int, float) else ""
        said = f"{name}: expected {expected}, got {value!r} ({type(value).__name__}){hint}"
        yield f"{place}: {said}" if place else said


def _takes(name: str) -> bool:
    """Whether a field takes lists or mappings, whose entries the typed check looks at."""
    types = field_types(name)
    return any(get_origin(kind) in (list, tuple, dict) for kind in types) or any(
        isinstance(kind, type) and issubclass(kind, BaseModel) for kind in types
    )
