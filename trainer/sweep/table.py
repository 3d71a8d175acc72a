"""What a sweep came to, from its run folders alone: summary.csv, summary.json, compare.html and compare.md in its
folder."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from trainer.run.files import write_atomically
from trainer.sweep.jobs import Job, jobs_in
from trainer.view.comparison import Run, read_run, set_apart, write_pages
from trainer.view.comparison.apart import at_the_same_time
from trainer.view.comparison.runs import differing, flat
from trainer.view.comparison.table import short, value, within_a_type

__all__ = ["rows_of", "runs_of", "write_tables"]

MOST_FIELDS = 3  # in the name of a run
# Of summary.json, under the same names.
MEASURES = ("steps", "tokens", "bytes", "flops", "seconds", "seconds_total", "tokens_per_second")


def write_tables(folder: Path) -> list[Job]:
    """Write them; returns the jobs. A sweep of which nothing has begun leaves nothing."""
    folder = Path(os.path.abspath(folder))
    jobs = jobs_in(folder)
    if not jobs:
        return []
    varied, rows = rows_of(jobs, folder)
    write_atomically(
        folder / "summary.json", json.dumps({"format": 1, "varied": varied, "jobs": rows}, indent=2) + "\n"
    )
    write_atomically(folder / "summary.csv", _csv(rows, varied))
    runs = runs_of(jobs, folder)
    set_apart(runs)
    best = next(
        (f": {row['bits_per_byte']:.3f} bits per byte at best" for row in rows if row["comparable"]), ""
    )
    write_pages(folder / "compare.html", f"Sweep of {len(rows)} runs{best}", runs, str(folder))
    return jobs


def runs_of(jobs: list[Job], folder: Path, curves: bool = True) -> list[Run]:
    """What each job left, for `trainer.view.comparison`. `folder`: the sweep's, in which the jobs have their names."""
    runs = [_run(job, folder, curves) for job in jobs]
    varied = within_a_type(runs)
    several = len({run.type for run in runs}) > 1
    for run in runs:
        given = [f"{short(name)} {value(run.config[name])}" for name in varied if name in run.config]
        if told := [*([run.type] if several else []), *given[:MOST_FIELDS]]:
            run.name = " · ".join([run.name, *told])
    return runs


def _run(job: Job, folder: Path, curves: bool) -> Run:
    name = Path(os.path.relpath(job.place, folder)).as_posix()
    lives = [(life["host"], life["begin"], life["end"]) for life in job.lives if life["end"]]
    try:
        run = read_run(job.run, name, curves=curves, config=job.config, lives=lives)
    except ValueError as error:  # which costs no sweep its page
        run = Run(job.run, name, str(job.config.get("type")), flat(job.config), {}, {}, {}, lives)
        run.state, run.why = "damaged", str(error)
        return run
    run.state, run.why = _ending(job)
    if job.state != "ok":
        run.score = {}
    return run


def rows_of(jobs: list[Job], folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The fields that differ between jobs, and of each job a row, the best first, those without a score last. Paths of
    runs are relative to `folder`."""
    configs = [flat(job.config) for job in jobs]
    varied = differing(configs)
    runs = runs_of(jobs, folder, curves=False)
    set_apart(runs)
    rows = [
        _row(job, one, varied, folder)
        | {"shared": bool(at_the_same_time(run, runs)), "comparable": not run.apart, "differs": run.apart}
        for job, one, run in zip(jobs, configs, runs, strict=True)
    ]
    return varied, sorted(rows, key=lambda row: (row["bits_per_byte"] is None, row["bits_per_byte"] or 0))


def _ending(job: Job) -> tuple[str, str]:
    """A job that says it is running has nobody left who runs it."""
    killed = job.state == "running"
    return ("killed", "killed, as no one wrote down how it ended") if killed else (job.state, job.why)


def _row(job: Job, config: dict[str, Any], varied: list[str], folder: Path) -> dict[str, Any]:
    summary = job.summary()
    score = summary.get("best") or summary.get("score") or {}
    state, why = _ending(job)
    return {
        "job": Path(os.path.relpath(job.place, folder)).as_posix(),
        "run": Path(os.path.relpath(job.run, folder)).as_posix(),
        "state": state,
        "why": why,
        "fields": {name: config.get(name) for name in varied},
        "bits_per_byte": score.get("bits_per_byte") if job.state == "ok" else None,
        "kind": score.get("kind"),
        "parameters": (summary.get("parameters") or {}).get("total"),
        **{name: summary.get(name) for name in MEASURES},
    }


def _csv(rows: list[dict[str, Any]], varied: list[str]) -> str:
    """One line a job; the fields that differ stand behind its state."""
    text = io.StringIO()
    plain = [name for name in rows[0] if name not in ("job", "state", "fields")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", "state", *varied, *plain])
    for row in rows:
        values = [row["fields"][name] for name in varied] + [row[name] for name in plain]
        writer.writerow(
            [row["job"], row["state"], *(json.dumps(v) if isinstance(v, list | bool) else v for v in values)]
        )
    return text.getvalue()
