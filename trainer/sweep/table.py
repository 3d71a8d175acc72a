"""What a sweep came to, from its run folders alone: summary.csv, summary.json and compare.html in its folder."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from trainer.run.files import write_atomically
from trainer.sweep.jobs import PLACES, Job, jobs_in
from trainer.view.comparison import write_page

__all__ = ["rows_of", "write_tables"]

# Of summary.json, under the same names.
MEASURES = ("steps", "tokens", "bytes", "flops", "seconds", "seconds_total", "tokens_per_second")


def write_tables(folder: Path) -> list[Job]:
    """Write the three; returns the jobs. A sweep of which nothing has begun leaves nothing."""
    folder = Path(os.path.abspath(folder))
    jobs = jobs_in(folder)
    if not jobs:
        return []
    varied, rows = rows_of(jobs, folder)
    write_atomically(
        folder / "summary.json", json.dumps({"format": 1, "varied": varied, "jobs": rows}, indent=2) + "\n"
    )
    write_atomically(folder / "summary.csv", _csv(rows, varied))
    write_page(folder, varied, rows)
    return jobs


def rows_of(jobs: list[Job], folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The fields that differ between jobs, and of each job a row, the best first, those without a score last. Paths of
    runs are relative to `folder`."""
    flat = [_flat(job.config) for job in jobs]
    names = dict.fromkeys(name for one in flat for name in one)
    # Architectures have fields of their own: what only some of them have does not differ between those.
    varied = [
        name
        for name in names
        if name not in PLACES and len({json.dumps(one[name]) for one in flat if name in one}) > 1
    ]
    rows = [_row(job, one, varied, folder) for job, one in zip(jobs, flat, strict=True)]
    _mark_shared(rows, jobs)
    _mark_other(rows, jobs)
    return varied, sorted(rows, key=lambda row: (row["bits_per_byte"] is None, row["bits_per_byte"] or 0))


def _row(job: Job, config: dict[str, Any], varied: list[str], folder: Path) -> dict[str, Any]:
    summary = job.summary()
    score = summary.get("best") or summary.get("score") or {}
    killed = job.state == "running"  # nobody is left who runs it
    why = "killed, as no one wrote down how it ended" if killed else job.why
    return {
        "job": Path(os.path.relpath(job.place, folder)).as_posix(),
        "run": Path(os.path.relpath(job.run, folder)).as_posix(),
        "state": "killed" if killed else job.state,
        "why": why,
        "fields": {name: config.get(name) for name in varied},
        "bits_per_byte": score.get("bits_per_byte") if job.state == "ok" else None,
        "kind": score.get("kind"),
        "parameters": (summary.get("parameters") or {}).get("total"),
        **{name: summary.get(name) for name in MEASURES},
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _mark_shared(rows: list[dict[str, Any]], jobs: list[Job]) -> None:
    """`shared`: another job ran on the same machine at the same time, so that its seconds say less."""
    lives = [(number, life) for number, job in enumerate(jobs) for life in job.lives if life["end"]]
    for number, row in enumerate(rows):
        row["shared"] = any(
            a["host"] == b["host"] and a["begin"] < b["end"] and b["begin"] < a["end"]
            for one, a in lives
            if one == number
            for other, b in lives
            if other != number
        )


def _mark_other(rows: list[dict[str, Any]], jobs: list[Job]) -> None:
    """`comparable`, and `differs`, why not: a score of other text than most of the sweep's, or of a part of it."""
    texts = [_text(job) for job in jobs]
    scored = [text for text, row in zip(texts, rows, strict=True) if row["bits_per_byte"] is not None]
    common = Counter(scored).most_common(1)[0][0] if scored else None
    for row, job, text in zip(rows, jobs, texts, strict=True):
        score = job.summary().get("score") or {}
        why = ""
        if row["bits_per_byte"] is None:
            why = "no score"
        elif text != common:
            why = "another held-out text"
        elif score.get("lossy_documents"):
            why = "tokens do not give the text back"
        elif score.get("non_causal_routing"):
            why = "choices saw later tokens"
        elif score.get("comparable") is False:
            why = "scored on a part chosen by tokens"
        row |= {"comparable": not why, "differs": why}


def _text(job: Job) -> tuple[Any, ...]:
    """What a score is of: the data, how much of it, and whether all of its words or answers."""
    manifest = job.run / "manifest.json"
    data = json.loads(manifest.read_text(encoding="utf-8")).get("data", {}) if manifest.is_file() else {}
    score = job.summary().get("score") or {}
    names = ("documents", "bytes", "of")
    return data.get("content"), data.get("heldout_bytes"), *(score.get(name) for name in names)


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
