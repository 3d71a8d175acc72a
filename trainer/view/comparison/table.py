"""What a comparison says of each run, as plain text: shared by the page, its Markdown and the console."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.view.comparison.runs import Run, differing
from trainer.view.format import bits_per_byte, duration, printable, quantity

__all__ = [
    "COLUMNS",
    "Group",
    "cells",
    "columns",
    "columns_of",
    "fields",
    "groups_of",
    "remarks",
    "score",
    "value",
    "within_a_type",
]

LONGEST = 60  # characters of a value, and of a name
WITHIN = 0.02  # by which a size may miss what it was to meet


def _memory(value: float) -> str:
    return f"{quantity(value)}B"


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.2f}s"


# Name of a column -> (what of a run's measures it shows, how).
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "FLOPs per byte": ("flops_per_byte", quantity),
    "steps": ("steps", "{:,}".format),
    "tokens": ("tokens", quantity),
    "bytes": ("bytes", quantity),
    "FLOPs": ("flops", quantity),
    "time": ("seconds", _time),
    "tokens/s": ("tokens_per_second", quantity),
    "peak memory": ("peak_memory_bytes", _memory),
    "written tokens/s": ("generation_tokens_per_second", quantity),
}
SCORE, CONTEXT = "bits per byte", "context"
OF_TIME = ("time", "tokens/s", "written tokens/s")


@dataclass
class Group:
    """Runs that differ in nothing but their seed."""

    name: str
    runs: list[Run]


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """In the order of their first runs."""
    fields_ = [name for name in differing(run.config for run in runs) if name != "seed"]
    varied = [name for name in within_a_type(runs) if name != "seed"]
    found: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.type, [run.config.get(name) for name in fields_]], default=str)
        found.setdefault(key, []).append(run)
    return [Group(_name(members, varied), members) for members in found.values()]


def _name(members: list[Run], varied: list[str]) -> str:
    if len(members) == 1:
        return shorten(members[0].name)
    config = members[0].config
    what = "seeds" if len({run.config.get("seed") for run in members}) == len(members) else "runs"
    told = [f"{short(name)} {value(config[name])}" for name in varied if name in config and name != "type"]
    return shorten(" ".join([members[0].type, *told[:2]])) + f" ({len(members)} {what})"


def columns(runs: Sequence[Run]) -> list[str]:
    """Fields that a table has room for, four at most. What differs because architectures do is in the settings."""
    types = {run.type for run in runs}
    first = ["type"] if len(types) > 1 and not all(run.type in run.name for run in runs) else []
    varied = within_a_type(runs)
    return [*first, *(name for name in ("preset", "seed") if name in varied), *_others(varied)][:4]


def within_a_type(runs: Sequence[Run]) -> list[str]:
    """Fields that differ between runs of one architecture."""
    of_types = [
        differing(run.config for run in runs if run.type == type_) for type_ in {r.type for r in runs}
    ]
    some = {name for names in of_types for name in names}
    return [name for name in differing(run.config for run in runs) if name in some]


def _others(varied: list[str]) -> list[str]:
    return [name for name in varied if name not in ("preset", "seed", "type")]


def cells(run: Run, varied: Sequence[str] = ()) -> dict[str, str]:
    """By name of the column, the score first, then the `varied` fields; "" where a run does not say it."""
    counts = run.parameters
    found = {SCORE: score(run)}
    found |= {name: value(run.config[name]) if name in run.config else "" for name in varied}
    found |= {CONTEXT: _context(run), "parameters": _parameters(counts)}
    measured = run.measures
    for name, (key, form) in COLUMNS.items():
        found[name] = form(measured[key]) if _is_number(measured[key]) else ""
    return found


def columns_of(shown: Sequence[dict[str, str]]) -> list[str]:
    """Those `cells` that say something: not what no run says, and the context where it is not the same for all."""
    return [
        name
        for name in shown[0]
        if any(one[name] for one in shown) and (name != CONTEXT or len({one[name] for one in shown}) > 1)
    ]


def score(run: Run) -> str:
    return bits_per_byte(run.score).replace("<=", "≤") if run.score else ""


def _context(run: Run) -> str:
    """What is seen of the text before, at most."""
    size: Any = run.score.get("context_bytes")
    return f"{quantity(size)}B" if _is_number(size) else ""


def _parameters(counts: dict[str, Any]) -> str:
    if not _is_number(counts.get("total")):
        return ""
    active = counts["active"]
    acting = f" ({quantity(active)} active)" if _is_number(active) and active != counts["total"] else ""
    return quantity(counts["total"]) + acting


def remarks(run: Run) -> list[str]:
    """What to know before its numbers are believed."""
    found = []
    if run.state != "ok":
        found.append(run.why if run.why.startswith(run.state) else f"{run.state}: {run.why}")
    if run.score and run.apart:
        found.append(f"not comparable: {run.apart}")
    found += [why for why in (run.aside, run.slow) if why]
    return found + [
        f"misses the target of {name} by {abs(error):.1%}"
        for name, error in run.missed.items()
        if abs(error) > WITHIN
    ]


def fields(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """(field, [(value, names of the runs that have it)]) of those that differ."""
    found = []
    for name in differing(run.config for run in runs):
        values: dict[str, list[str]] = {}
        for run in runs:
            if name in run.config:
                values.setdefault(value(run.config[name]), []).append(run.name)
        found.append((name, [*values.items()]))
    return found


def value(given: Any) -> str:
    text = given if isinstance(given, str) else json.dumps(given, default=str)
    return shorten(text)


def shorten(text: str, most: int = LONGEST) -> str:
    """On one line, its middle left out where it is too long."""
    line = printable(text).replace("\n", "↵")
    return line if len(line) <= most else f"{line[: most - 20]}…{line[-19:]}"


def short(name: str) -> str:
    """Of a field."""
    return name.removeprefix("model_cfg.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
