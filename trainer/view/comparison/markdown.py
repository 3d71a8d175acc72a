"""compare.md: the tables of a comparison for where HTML is not shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from trainer.view.comparison.runs import Run
from trainer.view.comparison.table import (
    Group,
    cells,
    columns,
    columns_of,
    fields,
    remarks,
    short,
    shorten,
)
from trainer.view.format import printable, quantity

__all__ = ["MARK", "markdown"]

MARK = "<!-- mytrainer compare -->"
LONGEST_SAMPLE = 600
MOST_SAMPLES = 20


def markdown(title: str, runs: Sequence[Run], groups: Sequence[Group], where: str) -> str:
    """`runs`: the best first."""
    together, apart = [run for run in runs if not run.apart], [run for run in runs if run.apart]
    parts = [MARK, f"# {_plain(title)}", _plain(where)]
    if together:
        parts += [
            "## Runs",
            "Bits per byte of the held-out text, lower is better; ≤ marks an upper bound.",
            _runs(together, runs),
        ]
    if apart:
        parts += ["## Set apart", "Not comparable with the runs above.", _runs(apart, runs)]
    entropies = sorted({run.entropy for run in together if run.entropy is not None})
    if entropies:
        parts.append(
            "Entropy of the text: " + ", ".join(f"{one:.3f}" for one in entropies) + " bits per byte."
        )
    parts += [*_roles(groups), *_fields(runs), *_samples(runs)]
    return "\n\n".join(parts) + "\n"


def _runs(shown: Sequence[Run], runs: Sequence[Run]) -> str:
    varied = columns(runs)
    of_all = [cells(run, varied) for run in shown]
    names = columns_of(of_all)
    rows = [
        [
            shorten(run.name),
            *(one[name] for name in names),
            "; ".join(remarks(run)),
        ]
        for run, one in zip(shown, of_all, strict=True)
    ]
    return _table(["run", *map(short, names), "remarks"], rows)


def _roles(groups: Sequence[Group]) -> list[str]:
    counted = [(group.name, group.runs[0].parameters) for group in groups]
    counted = [(name, counts) for name, counts in counted if counts.get("by_role")]
    if not counted:
        return []
    roles = list(dict.fromkeys(role for _, counts in counted for role in counts["by_role"]))
    rows = [
        [name, *(quantity(n) if (n := counts["by_role"].get(role)) else "" for role in roles)]
        for name, counts in counted
    ]
    return ["## Parameters by role", _table(["", *roles], rows)]


def _fields(runs: Sequence[Run]) -> list[str]:
    rows = [
        [
            name,
            "; ".join(
                f"{given}: {', '.join(shorten(one, 30) for one in names[:3])}"
                + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                for given, names in values
            ),
        ]
        for name, values in fields(runs)
    ]
    return ["## What differs in the settings", _table(["field", "value: runs"], rows)] if rows else []


def _samples(runs: Sequence[Run]) -> list[str]:
    written = [run for run in runs if run.sample]
    parts = ["## Samples", "The last of each run."] if written else []
    for run in written[:MOST_SAMPLES]:
        text = printable(run.sample[: LONGEST_SAMPLE + 1])
        cut = text if len(text) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE] + " [...]"
        fence = "`" * max(3, 1 + max((len(found) for found in re.findall("`+", cut)), default=0))
        parts += [f"### {_plain(shorten(run.name))}", f"{fence}text\n{cut}\n{fence}"]
    if len(written) > MOST_SAMPLES:
        parts.append(f"{len(written) - MOST_SAMPLES} more runs wrote one.")
    return parts


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell if place == 1 else _plain(cell) for cell in line) + " |"
        for place, line in enumerate(lines)
    )


def _plain(text: str) -> str:
    """A stranger's text on one line, as text: nothing in it is markup."""
    line = printable(text).replace("\n", " ")
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", line)
