"""Values that a run takes from variables with secret names: known here, and written or printed nowhere.

They are known by what they are, wherever they turn up: in a field, in the name of a text, in a sample. So short ones,
which any text may hold, are none that a field takes.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from configs.messages import REDACTED

__all__ = ["SHORTEST", "conceal", "concealed", "lacking", "pass_on", "take", "take_over"]

SHORTEST = 6  # characters
_HANDED = "MYTRAINER_CONCEALED"  # by which processes of a run hear of them
_values: dict[str, list[str]] = {}  # each, with the spellings that it has in files


def take(values: Iterable[str]) -> None:
    """Write and print them nowhere from now on, nor what a path among them ends with: texts are called by that."""
    given = [*values]
    ends = [end for value in given if len(end := value.rstrip("/").rpartition("/")[2]) >= SHORTEST]
    for value in [*given, *ends]:
        quoted = json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]
        _values[value] = sorted({value, *quoted, html.escape(value)}, key=len, reverse=True)


def conceal(text: str) -> str:
    """`text` without them."""
    for value in sorted(_values, key=len, reverse=True):
        for spelling in _values[value]:
            text = text.replace(spelling, REDACTED)
    return text


def concealed(value: Any) -> Any:
    """JSON values in which each text that holds one of them is `<redacted>` as a whole."""
    if isinstance(value, str):
        return REDACTED if any(secret in value for secret in _values) else value
    if isinstance(value, list):
        return [concealed(entry) for entry in value]
    if isinstance(value, dict):
        return {key: concealed(entry) for key, entry in value.items()}
    return value


def lacking(value: Any) -> bool:
    """Whether some text of JSON values was redacted."""
    if isinstance(value, str):
        return value == REDACTED
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(lacking, entries))


def pass_on(fields: Mapping[str, Any]) -> dict[str, str]:
    """What to put into the environment of a process of the run, whose config.yaml is without them. `fields`: those of
    the run."""
    held = {name: value for name, value in fields.items() if concealed(value) != value}
    return {_HANDED: json.dumps({"fields": held, "values": [*_values]})} if _values else {}


def take_over() -> dict[str, Any]:
    """In such a process: the fields, and none of it is in the environment from now on."""
    told = json.loads(os.environ.pop(_HANDED, "{}"))
    take(told.get("values", ()))
    return told.get("fields", {})
