"""Who is better than whom, from run folders alone: ranks where pairs are told apart, noise of seeds and of the text.

A pair's difference is the mean over the seeds that both have, and its interval Student's t over them; which pairs are
told apart is decided over all of them together (trainer/bench/statistics.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.bench.documents import DocumentScores, read_document_scores, text_noise
from trainer.bench.statistics import (
    LEVEL,
    Interval,
    corrected_level,
    paired_interval,
    smallest_difference,
    spread,
    told_apart,
    unpaired_interval,
)
from trainer.sweep.jobs import Job
from trainer.sweep.table import rows_of

__all__ = ["MOST_SPLITS", "Entry", "Pair", "alike", "difference", "plain", "standings"]

MOST_SPLITS = 10_000  # that are counted one by one


@dataclass(frozen=True)
class Entry:
    """What is compared: its runs by seed, and what is told of it besides."""

    label: str
    jobs: Mapping[int, Job]
    told: Mapping[str, Any] = field(default_factory=dict)

    def scores(self) -> dict[int, float]:
        """Bits per byte by seed, of the runs that came to their end."""
        found = {seed: job.done() for seed, job in self.jobs.items()}
        return {seed: score for seed, score in found.items() if score is not None}


@dataclass(frozen=True)
class Pair:
    """`second` less `first`, bits per byte: below zero the second is better."""

    first: str
    second: str
    interval: Interval
    seeds: int
    text_error: float | None  # standard error of the difference for other documents of the kind

    def told(self, apart: bool) -> dict[str, Any]:
        i = self.interval
        return {
            "first": self.first,
            "second": self.second,
            "difference": i.mean,
            "low": i.low,
            "high": i.high,
            "p": i.p,
            "told_apart": apart,
            "seeds": self.seeds,
            "error_of_seeds": i.error,
            "error_of_text": self.text_error,
        }


def difference(first: Entry, second: Entry) -> Pair | None:
    """Over the seeds that both have; None where they share none."""
    ours, theirs = first.scores(), second.scores()
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    interval = paired_interval([theirs[seed] - ours[seed] for seed in shared])
    noise = text_noise(_documents(first, shared), _documents(second, shared))
    return Pair(first.label, second.label, interval, len(shared), noise)


def _documents(entry: Entry, seeds: Sequence[int]) -> list[DocumentScores]:
    """Of these runs; none where some have none."""
    found = [read_document_scores(entry.jobs[seed].run) for seed in seeds]
    return [one for one in found if one is not None] if None not in found else []


def standings(entries: Sequence[Entry], folder: Path) -> dict[str, Any]:
    """`entries`, the best first, `pairs` of those that compare, `level` of their intervals, and the smallest difference
    that shows. `folder`: what paths are relative to."""
    strange = _not_comparable(entries, folder)
    comparable = [entry for entry in entries if entry.scores() and entry.label not in strange]
    pairs = [
        pair
        for one, two in itertools.combinations(comparable, 2)
        if (pair := difference(one, two)) is not None
    ]
    intervals = [pair.interval for pair in pairs]
    level = corrected_level(intervals)
    apart = told_apart(intervals)
    pairs = [Pair(p.first, p.second, p.interval.at(level), p.seeds, p.text_error) for p in pairs]
    rows = [_row(entry, folder, strange) for entry in entries]
    for row in rows:
        row |= _rank(row["label"], pairs, apart, len(comparable)) if not row["differs"] else {"rank": None}
    return {
        "entries": sorted(rows, key=lambda row: (bool(row["differs"]), row["bits_per_byte"] or math.inf)),
        "pairs": [pair.told(found) for pair, found in zip(pairs, apart, strict=True)],
        "level": level,
        "shows": _smallest(pairs),
    }


def _not_comparable(entries: Sequence[Entry], folder: Path) -> dict[str, str]:
    """Label -> why its scores are no match for those of most."""
    jobs = [job for entry in entries for job in entry.jobs.values()]
    _, rows = rows_of(jobs, folder) if jobs else ([], [])
    why = {
        (folder / row["job"]).resolve(): row["differs"] for row in rows if row["bits_per_byte"] is not None
    }
    found = {}
    for entry in entries:
        reasons = [why.get(job.place.resolve(), "") for job in entry.jobs.values()]
        if any(reasons):
            found[entry.label] = next(filter(None, reasons))
        elif not entry.scores():
            found[entry.label] = "no score"
    return found


def _row(entry: Entry, folder: Path, strange: Mapping[str, str]) -> dict[str, Any]:
    scores = entry.scores()
    summaries = [entry.jobs[seed].summary() for seed in scores]
    values = list(scores.values())
    interval = paired_interval(values) if values else None
    first = summaries[0] if summaries else {}
    failed = {seed: job.why or job.state for seed, job in entry.jobs.items() if seed not in scores}

    def mean(name: str) -> float | None:
        found = [summary[name] for summary in summaries if summary.get(name) is not None]
        return float(np.mean(found)) if found else None

    return {
        "label": entry.label,
        **entry.told,
        "bits_per_byte": interval.mean if interval else None,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "spread_of_seeds": spread(values) if values else None,
        "kind": first.get("score", {}).get("kind"),
        "scores": scores,
        "failed": failed,
        "runs": {seed: str(job.run.relative_to(folder)) for seed, job in entry.jobs.items()},
        "differs": strange.get(entry.label, ""),
        "parameters": first.get("parameters"),
        **{
            name: mean(name)
            for name in (
                "steps",
                "tokens",
                "bytes",
                "flops",
                "seconds",
                "tokens_per_second",
                "peak_memory_bytes",
            )
        },
    }


def _rank(label: str, pairs: Sequence[Pair], apart: Sequence[bool], of: int) -> dict[str, Any]:
    """`rank`: the best and the worst place that is left to it, and those that it is not told apart from."""
    better = worse = 0
    like = []
    for pair, found in zip(pairs, apart, strict=True):
        if label not in (pair.first, pair.second):
            continue
        other = pair.second if label == pair.first else pair.first
        if not found:
            like.append(other)
        elif (pair.interval.mean < 0) == (label == pair.first):  # the second is better, and it is the first
            better += 1
        else:
            worse += 1
    return {"rank": [1 + better, of - worse], "not_told_apart_from": like}


def _smallest(pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """What the median pair would have to differ by: `alone`, as the only pair, and `first`, as the only one of all
    these that differs."""
    measured = [pair for pair in pairs if pair.seeds > 1]
    if not measured:
        return None
    seeds = min(pair.seeds for pair in measured)
    typical = float(np.median([pair.interval.error * math.sqrt(pair.seeds) for pair in measured]))
    texts = [pair.text_error for pair in pairs if pair.text_error is not None]
    return {
        "seeds": seeds,
        "spread": typical,
        "alone": smallest_difference(typical, seeds),
        "first": smallest_difference(typical, seeds, 1 - (1 - LEVEL) / len(pairs)),
        "text_error": float(np.median(texts)) if texts else None,
    }


def alike(first: Entry, second: Entry) -> dict[str, Any]:
    """Of two groups of runs that differ in nothing but their seeds: whether they are told apart (Welch), and how many
    of all splits of these runs into such halves are, or of 10,000 drawn ones."""
    ours, theirs = list(first.scores().values()), list(second.scores().values())
    if min(len(ours), len(theirs)) < 2:
        raise ValueError("an A/A comparison needs two runs on each side that came to their end")
    found = unpaired_interval(ours, theirs)
    every = np.array([*ours, *theirs])
    hits, splits = 0, 0
    for chosen in _splits(len(every), len(ours)):
        rest = np.setdiff1d(np.arange(len(every)), chosen)
        hits += unpaired_interval(every[chosen], every[rest]).p < 1 - LEVEL
        splits += 1
    return {
        "first": first.label,
        "second": second.label,
        "scores": [ours, theirs],
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "told_apart": found.p < 1 - LEVEL,
        "spread_of_seeds": spread(every),
        "splits": splits,
        "splits_told_apart": int(hits) / splits,
    }


def _splits(n: int, k: int) -> Any:
    if math.comb(n, k) <= MOST_SPLITS * 2:
        return (np.array(chosen) for chosen in itertools.combinations(range(n), k))
    rng = np.random.default_rng(0)
    return (rng.permutation(n)[:k] for _ in range(MOST_SPLITS))


def plain(value: Any) -> Any:
    """As JSON has it, which knows no number that is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
