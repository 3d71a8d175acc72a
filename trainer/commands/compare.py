"""The `compare` command: runs side by side, on one page, as Markdown, or as JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.files import shown
from configs.grammar import word
from configs.messages import ConfigError
from configs.runs import OUTPUTS, RUNS, folder_of_path
from configs.sweeps import MULTIRUN
from naming import command_line, did_you_mean, expand_path
from trainer.run.metrics import to_json
from trainer.sweep.jobs import RECORD, jobs_in
from trainer.sweep.table import runs_of
from trainer.view.comparison import Run, read_run, set_apart, write_pages
from trainer.view.comparison.markdown import MARK
from trainer.view.comparison.pages import by_score
from trainer.view.comparison.runs import Curve, differing
from trainer.view.comparison.table import remarks, score
from trainer.view.console import Console

__all__ = ["main"]

PAGE_MARK = '<meta name="generator" content="mytrainer compare">'


def main(argv: list[str]) -> int:
    """`python mytrainer.py compare RUN RUN ... [--output compare.html] [--json]`."""
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py compare",
        description="Runs side by side: bits per byte against tokens, bytes, FLOPs and seconds, what each cost, what "
        "differs in the settings, a sample of each. Runs whose scores do not compare are set apart, with the reason.",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run folder, or the folder of a sweep, which stands for its runs",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page to write, with Markdown beside it, compare.md (default: compare.html; with --json: none)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print all of it, every point of every curve, as JSON"
    )
    args = parser.parse_args(argv)
    output = None if args.json and args.output is None else expand_path(args.output or "compare.html")
    if output is not None:
        _check(output)
    with Console(stream=sys.stderr).doing("reading the runs"):
        runs = _read(args.runs)
    set_apart(runs)
    if output is not None:
        write_pages(output, _title(runs), runs, " · ".join(shown(run.path.absolute()) for run in runs[:8]))
    if args.json:
        print(json.dumps(to_json(_all_of(runs)), indent=1, allow_nan=False, default=str))
        return 0
    for line in _table(by_score(runs)):
        print(line)
    print(f"{output} and {output.with_suffix('.md').name}" if output else "")
    return 0


# --- which runs -----------------------------------------------------------------------------------------


def _read(given: Sequence[str]) -> list[Run]:
    """ConfigError for what is no run, has no score, or is given twice."""
    runs: list[Run] = []
    for text in given:
        path = folder_of_path(expand_path(text))
        if _is_run(path):
            runs.append(_one(path, text))
        else:
            runs += _sweep(path, text)
    for name, count in Counter(os.path.realpath(run.path) for run in runs).items():
        if count > 1:
            raise ConfigError(
                f"command line: {shown(Path(name))} is given {count} times. Leave one of them out"
            )
    if len(runs) < 2:
        raise ConfigError(
            f"command line: {given[0]} is one run, and a comparison takes two or more. Its own page is "
            f"{runs[0].path / 'report.html'}"
        )
    _name(runs)
    return runs


def _is_run(path: Path) -> bool:
    """A job of a sweep is one, the sweep's own folder none though it has a summary.json."""
    return any((path / name).is_file() for name in ("manifest.json", "metrics.jsonl"))


def _one(path: Path, text: str) -> Run:
    run = _readable(path)
    if not run.score:
        raise ConfigError(
            f"command line: {text} has no score yet. Go on with it: {command_line(word('resume', path))}, or leave it "
            "out"
        )
    return run


def _readable(path: Path) -> Run:
    try:
        record = path / RECORD
        lives = []
        if record.is_file():
            told = json.loads(record.read_text(encoding="utf-8"))["lives"]
            lives = [(life["host"], life["begin"], life["end"]) for life in told if life["end"]]
        folder = path.resolve()
        # The number of a job alone says nothing.
        name = f"{folder.parent.name}/{folder.name}" if folder.name.isdecimal() else folder.name
        return read_run(path, name, lives=lives)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"command line: {error}") from None


def _sweep(path: Path, text: str) -> list[Run]:
    """The jobs of a sweep, also those without a score, which its page has too."""
    if not path.exists():
        raise ConfigError(f"command line: {text} is not there.{_near(path)}")
    if not path.is_dir():
        raise ConfigError(f"command line: {text} is a file; the folder of a run is needed")
    try:
        jobs = jobs_in(path) if (path / MULTIRUN).is_file() else []
        runs = runs_of(jobs, path)
    except ValueError as error:
        raise ConfigError(f"command line: {error}") from None
    if not jobs:
        raise ConfigError(
            f"command line: {text} holds no run (no manifest.json, no metrics.jsonl), and no sweep.{_near(path)}"
        )
    for run in runs:
        if run.state == "killed":  # which nobody knows of a sweep that may be going on
            run.state, run.why = "running", "running still, or killed"
    if not any(run.score for run in runs):
        raise ConfigError(f"command line: no job of the sweep {text} has a score yet")
    return runs


def _near(path: Path) -> str:
    known = {
        str(one.parent)
        for folder in (RUNS, OUTPUTS, path, path.parent)
        for one in folder.glob("*/manifest.json")
    }
    inside = sorted(one for one in known if Path(one).parent == path)
    if inside:
        return f" Runs in it: {', '.join(inside[:5])}{' ...' if len(inside) > 5 else ''}"
    return did_you_mean(str(path), known)


def _name(runs: Sequence[Run]) -> None:
    """By the path where folders are called alike."""
    counts = Counter(run.name for run in runs)
    for run in runs:
        if counts[run.name] > 1:
            run.name = shown(run.path.absolute())


# --- what comes out -------------------------------------------------------------------------------------


def _check(output: Path) -> None:
    """ConfigError where nothing can be written, or what is there is no comparison."""
    if output.suffix != ".html":
        raise ConfigError(
            f"command line: --output {output}: the page ends in .html. Nearest: {output.with_suffix('.html')}"
        )
    if not output.parent.is_dir():
        raise ConfigError(f"command line: --output {output}: there is no folder {output.parent}")
    for path, mark in ((output, PAGE_MARK), (output.with_suffix(".md"), MARK)):
        if path.exists() and not (
            path.is_file() and mark in path.read_text(encoding="utf-8", errors="replace")
        ):
            raise ConfigError(
                f"command line: --output {output}: {path} is there already, and no comparison. Choose another name"
            )


def _title(runs: Sequence[Run]) -> str:
    best = next((run for run in by_score(runs) if run.score and not run.apart), None)
    return f"{len(runs)} runs" + (f": {score(best)} bits per byte at best" if best else "")


def _table(runs: Sequence[Run]) -> list[str]:
    rows = [["run", "bits per byte", ""]]
    rows += [[run.name, score(run) or "-", "; ".join(remarks(run))] for run in runs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _all_of(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "format": 1,
        "differs": differing(run.config for run in runs),
        "runs": [
            {
                "name": run.name,
                "path": str(run.path.absolute()),
                "type": run.type,
                "state": run.state,
                "score": run.score,
                "apart": run.apart,
                "slow": run.slow,
                "remarks": remarks(run),
                "entropy": run.entropy,
                "parameters": run.parameters,
                **run.measures,
                "config": run.config,
                "sample": run.sample,
                "held_out": _columns(run.held_out),
                "training": _columns(run.training),
            }
            for run in by_score(runs)
        ],
    }


def _columns(curve: Curve | None) -> dict[str, list[float | None]]:
    if curve is None:
        return {}
    return {
        "bits_per_byte": _listed(curve.bits),
        **{axis: _listed(values) for axis, values in curve.spent.items()},
    }


def _listed(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
