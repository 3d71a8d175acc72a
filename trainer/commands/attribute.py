"""The `attribute` command: what each field makes of the difference between two configurations of one type."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from configs import trust
from configs.messages import ConfigError
from configs.runs import OUTPUTS
from naming import command_line, expand_path, shorten, shorten_text
from trainer.bench.attribution import Path, contributions, differing, path_between
from trainer.bench.page import markdown_table, table_lines, wrapped
from trainer.bench.runs import Run, Subject, of_one_folder, say_notices, subject, train_all
from trainer.bench.standings import plain
from trainer.bench.statistics import Interval
from trainer.run.files import write_atomically
from trainer.sweep.jobs import Job
from trainer.sweep.table import write_tables

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """`python mytrainer.py attribute`. The exit status is 1 where a run failed."""
    args = _arguments(argv)
    with trust.of_one_command():
        first, second = _two(args.words)
        fields = differing(first, second)
        path = path_between(first, second)
        folder = _folder(args.output, first, second)
        say_notices([first, second])
        with of_one_folder(folder):
            return _attribute(folder, path, fields, args.seeds, argv)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py attribute",
        description="Train every point of the path from configuration A to B, changing the fields in which they differ "
        "one after the other, in both orders, over the same seeds: what does each of them make? The same command goes "
        "on where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="A B or FIELD=VALUE",
        help="two configurations of one type, each a model file or, in quotes, one with fields: "
        "'gpt2 model_cfg.bias=false'; and fields of both, such as preset=nano",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each point (default 3)")
    parser.add_argument("--output", help="the folder of it all (default: one of its own below outputs/)")
    args = parser.parse_intermixed_args(argv)
    if args.seeds < 2:
        raise ConfigError(f"command line: --seeds: must be at least 2, got {args.seeds}")
    return args


def _two(words: list[str]) -> tuple[Subject, Subject]:
    """Both checked."""
    given = [(word, _split(word)) for word in words]
    common = [word for word, parts in given if "=" in parts[0]]
    named = [(word, parts) for word, parts in given if "=" not in parts[0]]
    if len(named) != 2:
        raise ConfigError(
            f"command line: two configurations are compared, and {len(named)} are given. Put the fields of one in "
            "quotes with it: attribute gpt2 'gpt2 model_cfg.bias=false'"
        )
    subjects, problems = [], []
    for letter, (word, parts) in zip("AB", named, strict=True):
        try:
            subjects.append(subject(letter, parts[0], [*common, *parts[1:]]))
        except ConfigError as error:
            problems += [f"{letter} ({word}): {text}" for text in error.problems]
    if problems:
        raise ConfigError(problems)
    return subjects[0], subjects[1]


def _split(word: str) -> list[str]:
    try:
        return shlex.split(word) if " " in word else [word]
    except ValueError as error:
        raise ConfigError(f"command line: {shorten_text(word)!r}: {error}") from None


def _folder(given: str | None, first: Subject, second: Subject) -> FilePath:
    """The same for the same two."""
    if given is not None:
        return FilePath(os.path.abspath(expand_path(given)))
    asked = json.dumps([one.cfg.model_dump(mode="json") for one in (first, second)])
    return (OUTPUTS / f"attribution-{hashlib.sha256(asked.encode()).hexdigest()[:8]}").absolute()


def _tell(text: str) -> None:
    print(text, flush=True)


def _place(chosen: frozenset[int], of: int) -> str:
    """A point's folder: A, B, or A with the steps, counted from 1, that have been taken."""
    if len(chosen) in (0, of):
        return "B" if chosen else "A"
    return f"A+{min(chosen) + 1}" + (f"-{max(chosen) + 1}" if len(chosen) > 1 else "")


def _attribute(
    folder: FilePath, path: Path, fields: Mapping[str, tuple[Any, Any]], seeds: int, argv: list[str]
) -> int:
    k = len(path.steps)
    order = list(dict.fromkeys([*path.forward, *path.backward]))
    _tell(f"{k} steps from A to B, {len(order)} configurations, {seeds} seeds each, in {folder}")
    for number, step in enumerate(path.steps, 1):
        _tell(f"  {number}. {_changes(step, fields)}")
    runs = {
        (chosen, seed): Run(f"{_place(chosen, k)}/seed-{seed}", path.points[chosen].changed(seed=seed))
        for seed in range(1, seeds + 1)  # a seed of all points after the other: pairs, when it is stopped
        for chosen in order
    }
    try:
        jobs = train_all(folder, list(runs.values()), _tell)
    except SystemExit:
        _tell(f"stopped; go on with: {command_line('attribute', *argv)}")
        raise
    result = _result(path, fields, {key: jobs[run.place] for key, run in runs.items()}, argv)
    write_atomically(folder / "attribution.json", json.dumps(plain(result), indent=2, allow_nan=False) + "\n")
    rows, notes = _table(result), _notes(result)
    page = ["# Attribution", "\n".join(markdown_table(rows)), *notes]
    write_atomically(folder / "attribution.md", "\n\n".join(page) + "\n")
    write_tables(folder)
    for line in [
        "",
        *table_lines(rows),
        "",
        *wrapped(notes),
        f"attribution.json, attribution.md in {folder}",
    ]:
        _tell(line)
    return int(any(job.done() is None for job in jobs.values()))


def _changes(step: list[str], fields: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}: {_value(fields[name][0])} -> {_value(fields[name][1])}" for name in step)


def _value(value: Any) -> str:
    return shorten_text(json.dumps(value), 40)


def _result(
    path: Path,
    fields: Mapping[str, tuple[Any, Any]],
    jobs: Mapping[tuple[frozenset[int], int], Job],
    argv: list[str],
) -> dict[str, Any]:
    scores: dict[frozenset[int], dict[int, float]] = {chosen: {} for chosen, _ in jobs}
    for (chosen, seed), job in jobs.items():
        if (score := job.done()) is not None:
            scores[chosen][seed] = score
    rows, whole, level = contributions(path, scores)
    k = len(path.steps)
    return {
        "format": 1,
        "command": argv,
        "level": level,
        "whole": _told(whole),
        "steps": [
            {
                **row,
                "changes": {name: list(fields[name]) for name in row["fields"]},
                **{kind: _told(row[kind]) for kind in ("forward", "backward", "interaction")},
            }
            for row in rows
        ],
        "points": {_place(chosen, k): found for chosen, found in scores.items()},
        "failed": {
            f"{_place(chosen, k)}, seed {seed}": job.why or job.state
            for (chosen, seed), job in jobs.items()
            if job.done() is None
        },
    }


def _told(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "p": interval.p}


def _table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "step", "in this order", "in the other", "interaction")]
    for number, step in enumerate(result["steps"], 1):
        names = [f"{name} {_value(old)} -> {_value(new)}" for name, (old, new) in step["changes"].items()]
        shown = [_cell(step[kind], step.get("told_apart", {}).get(kind)) for kind in ("forward", "backward")]
        both = len(result["steps"]) > 1
        more = _cell(step["interaction"], step.get("told_apart", {}).get("interaction")) if both else ""
        rows.append((str(number), shorten(names, 3), *shown, more))
    return [*rows, ("", "all, A to B", _cell(result["whole"], None), "", "")]


def _cell(found: dict[str, Any] | None, apart: bool | None) -> str:
    """The mean and half its interval, with a star where it is told from zero."""
    if found is None:
        return "none"
    half = found["high"] - found["mean"]
    return f"{found['mean']:+.4f}" + (f" ± {half:.4f}" if half < 1e9 else "") + ("*" if apart else "")


def _notes(result: dict[str, Any]) -> list[str]:
    steps = result["steps"]
    found = [
        "Bits per byte that each step adds, below zero for the better: means over paired seeds with Student's t "
        f"intervals at {result['level']:.2%}, 95 % of those marked * (Benjamini-Hochberg); of the whole at 95 %."
    ]
    if len(steps) > 1:
        found.append(
            "In this order a step stands on those above it, in the other on those below. The interaction is what it "
            "adds more in the other order: what it gains or loses by these others."
        )
    together = [number for number, step in enumerate(steps, 1) if len(step["fields"]) > 1]
    if together:
        found.append(
            f"The fields of step {shorten([str(n) for n in together])} are refused without each other: one step."
        )
    for step in steps:
        if step.get("told_apart", {}).get("interaction"):
            name = " and ".join(step["fields"])
            above, below = (
                shorten(step["on_top_of"][kind], 3) or "A alone" for kind in ("forward", "backward")
            )
            found.append(
                f"Interaction: {name} makes {step['forward']['mean']:+.4f} on top of {above}, and "
                f"{step['backward']['mean']:+.4f} on top of {below}."
            )
    return [*found, *(f"{place}: {why}" for place, why in result["failed"].items())]
