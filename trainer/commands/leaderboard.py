"""The `leaderboard` command: which architecture is better, tuned alike, over several seeds, and how sure one may be."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.rates import COMPONENTS
from configs import trust
from configs.messages import ConfigError
from configs.runs import OUTPUTS
from configs.schema import RunConfig
from models import ARCHITECTURES
from naming import command_line, expand_path
from trainer.bench.page import a_a_lines, markdown, notes, table, table_lines, wrapped
from trainer.bench.runs import Run, Subject, label_of, of_one_folder, say_notices, subject, train_all
from trainer.bench.standings import Entry, alike, plain, standings
from trainer.optim import OPTIMIZERS
from trainer.run.files import write_atomically
from trainer.sweep.jobs import Job
from trainer.sweep.table import write_tables

__all__ = ["main"]

TUNING_SEED = 0  # scored ones begin at 1
FACTORS = (
    1.0,
    2.0,
    0.5,
    4.0,
    0.25,
    8.0,
    0.125,
)  # of the file's rates, in the order in which trials take them
COMPONENT_RATES = ("base_model_lr", *dict.fromkeys(name for names in COMPONENTS.values() for name in names))
RATES = {"learning_rate", *COMPONENT_RATES, *(row.rate for row in OPTIMIZERS.values())}


def main(argv: list[str]) -> int:
    """`python mytrainer.py leaderboard`. The exit status is 1 where a run failed."""
    args = _arguments(argv)
    words = [word for word in args.words if "=" in word]
    named = [word for word in args.words if "=" not in word]
    with trust.of_one_command():
        subjects = _subjects(named, words)
        if args.a_a and len(subjects) != 1:
            raise ConfigError(
                f"command line: --a_a compares one architecture with itself, and {len(named)} are given"
            )
        folder = _folder(args.output, subjects, words, args.a_a)
        say_notices(subjects)
        try:
            with of_one_folder(folder):
                return _a_a(folder, subjects[0], args) if args.a_a else _board(folder, subjects, args, argv)
        except SystemExit:  # a signal: the run that it met has been saved
            _tell(f"stopped; go on with: {command_line('leaderboard', *argv)}")
            raise


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py leaderboard",
        description="Train several architectures under equal conditions and rank them where they are told apart. Each "
        "gets the same number of trials of its learning rate, on another seed than those that are scored. The same "
        "command goes on where it stopped; more --seeds, --trials or architectures add to what is there.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="ARCHITECTURE or FIELD=VALUE",
        help="names of configs/, model files, or 'all'; and fields of all runs, such as preset=nano time_budget=0.5",
    )
    parser.add_argument("--seeds", type=int, default=3, help="scored runs of each (default 3)")
    parser.add_argument(
        "--trials",
        type=int,
        default=2,
        help=f"of the learning rate, 1 to {len(FACTORS)} (default 2; 1: as in the file)",
    )
    parser.add_argument("--output", help="the folder of it all (default: one of its own below outputs/)")
    parser.add_argument(
        "--a_a",
        action="store_true",
        help="one architecture against itself: --seeds runs, and as many of other seeds",
    )
    args = parser.parse_intermixed_args(argv)
    if not 1 <= args.trials <= len(FACTORS):
        raise ConfigError(f"command line: --trials: must be 1 to {len(FACTORS)}, got {args.trials}")
    least = 2 if args.a_a else 1
    if args.seeds < least:
        raise ConfigError(f"command line: --seeds: must be at least {least}, got {args.seeds}")
    return args


def _subjects(named: list[str], words: list[str]) -> list[Subject]:
    """All of them checked, and every problem told at once."""
    if not named:
        raise ConfigError(
            "command line: no architecture is given. Name some of configs/, or all: leaderboard all"
        )
    models = [name for given in named for name in (sorted(ARCHITECTURES) if given == "all" else [given])]
    found: dict[str, Subject] = {}
    problems: list[str] = []
    for model in dict.fromkeys(models):
        label = label_of(model)
        if label in found:
            problems.append(
                f"command line: two model files are called {label}. Give one of them another name"
            )
            continue
        try:
            found[label] = subject(label, model, words, RATES)
        except ConfigError as error:
            if "all" in named and model not in named and _stands_on_a_base(label):
                print(f"note: {label} is left out: {error.problems[0]}", file=sys.stderr)
                continue
            problems += [
                text if text.startswith(("command line", label)) else f"{label}: {text}"
                for text in error.problems
            ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return list(found.values())


def _stands_on_a_base(type_: str) -> bool:
    """Whether an architecture needs weights that were trained elsewhere, which `all` may not find here."""
    from configs.validate import architecture_config

    return bool(architecture_config(type_, None, lambda key: "").elsewhere)


def _folder(given: str | None, subjects: Sequence[Subject], words: Sequence[str], a_a: bool) -> Path:
    """The same for the same architectures and fields."""
    if given is not None:
        return Path(os.path.abspath(expand_path(given)))
    asked = json.dumps([[s.label for s in subjects], sorted(words), a_a])
    kind = "a-a" if a_a else "leaderboard"
    return (OUTPUTS / f"{kind}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}").absolute()


def _tell(text: str) -> None:
    print(text, flush=True)


# -- tuning and scoring ----------------------------------------------------------------------------------------


def scaled(one: Subject, factor: float) -> dict[str, Any]:
    """All learning rates of a run times `factor`: matrices, vectors and components may have rates of their own."""
    cfg, fields = one.cfg, RunConfig.model_fields
    in_parts = cfg.use_lora or cfg.base_model_lr is not None or bool(one.model_cfg.elsewhere)
    parts = [name for name in COMPONENT_RATES if in_parts or getattr(cfg, name) != fields[name].default]
    names = {"learning_rate", OPTIMIZERS[cfg.optimizer].rate, *parts}
    return {name: rate * factor for name in sorted(names) if (rate := getattr(cfg, name)) is not None}


def _trial(one: Subject, factor: float) -> Run:
    return Run(f"{one.label}/x{factor:g}-tune", one.changed(seed=TUNING_SEED, **scaled(one, factor)))


def _scored(one: Subject, factor: float, seed: int) -> Run:
    return Run(f"{one.label}/x{factor:g}-seed-{seed}", one.changed(seed=seed, **scaled(one, factor)))


def _board(folder: Path, subjects: Sequence[Subject], args: argparse.Namespace, argv: list[str]) -> int:
    factors = FACTORS[: args.trials]
    seeds = range(1, args.seeds + 1)
    trials = {
        one.label: [_trial(one, factor) for factor in factors] if len(factors) > 1 else [] for one in subjects
    }
    jobs: dict[str, Job] = {}
    tuned = f"{len(factors)} trials of its learning rates" if len(factors) > 1 else "the rates of its file"
    _tell(f"architectures: {len(subjects)}; each has {tuned} and {args.seeds} scored runs, in {folder}")
    jobs |= train_all(folder, [run for runs in trials.values() for run in runs], _tell)
    chosen = {one.label: _best(factors, [jobs[run.place] for run in trials[one.label]]) for one in subjects}
    # A seed of all of them after the other: what is there when it is stopped makes pairs.
    scored = [
        _scored(one, factor, seed)
        for seed in seeds
        for one in subjects
        if (factor := chosen[one.label]) is not None
    ]
    jobs |= train_all(folder, scored, _tell)
    entries = []
    for one in subjects:
        factor = chosen[one.label]
        runs = {} if factor is None else {seed: jobs[_scored(one, factor, seed).place] for seed in seeds}
        entries.append(
            Entry(one.label, runs, _told(one, factor, factors, [jobs[r.place] for r in trials[one.label]]))
        )
    result = {"format": 1, "seeds": list(seeds), "tuning_seed": TUNING_SEED, **standings(entries, folder)}
    _write(folder, "Leaderboard", _how(subjects, args, factors), result, argv)
    failed = [job for job in jobs.values() if job.done() is None]
    return int(bool(failed))


def _best(factors: Sequence[float], trials: Sequence[Job]) -> float | None:
    """The factor whose trial scored best, the first without trials; None where all of them failed."""
    if not trials:
        return factors[0]
    scores = [
        (score, factor)
        for job, factor in zip(trials, factors, strict=True)
        if (score := job.done()) is not None
    ]
    return min(scores)[1] if scores else None


def _told(
    one: Subject, factor: float | None, factors: Sequence[float], trials: Sequence[Job]
) -> dict[str, Any]:
    """What the table says of an entry beside its scores."""
    tried = [
        {"factor": f, "bits_per_byte": job.done(), "state": job.state, "why": job.why}
        for f, job in zip(factors, trials, strict=False)
    ]
    edge = ""
    if factor is None:
        edge = f"every trial failed, the first by: {trials[0].why}"
    elif len(factors) > 2 and factor in (min(factors), max(factors)):
        edge = f"its best rate, x{factor:g}, is at the edge of what was tried: a further one may be better."
    rates = {} if factor is None else scaled(one, factor)
    return {"type": one.cfg.type, "rate_factor": factor, "rates": rates, "trials": tried, "edge": edge}


def _how(subjects: Sequence[Subject], args: argparse.Namespace, factors: Sequence[float]) -> list[str]:
    words = " ".join(subjects[0].words) or "nothing"
    tuned = "The learning rates of the files as they are."
    if len(factors) > 1:
        tuned = (
            f"Each had {len(factors)} trials of its learning rates, the file's times "
            f"{', '.join(f'{f:g}' for f in factors)}, on seed {TUNING_SEED}, which is not scored. The text that "
            f"chose among them is the held-out text, too."
        )
    return [f"Set for all: {words}. Seeds 1 to {args.seeds}. {tuned}"]


def _write(folder: Path, title: str, how: list[str], result: dict[str, Any], argv: list[str]) -> None:
    kept = plain({"command": argv, "how": how, **result})
    write_atomically(folder / "leaderboard.json", json.dumps(kept, indent=2, allow_nan=False) + "\n")
    write_atomically(folder / "leaderboard.md", markdown(title, how, result))
    write_tables(folder)
    _tell("")
    for line in [*table_lines(table(result)), "", *wrapped(notes(result))]:
        _tell(line)
    _tell(f"leaderboard.json, leaderboard.md, compare.html in {folder}")


# -- one against itself ------------------------------------------------------------------------------------------


def _a_a(folder: Path, one: Subject, args: argparse.Namespace) -> int:
    n = args.seeds
    runs = [_scored(one, 1.0, seed) for seed in range(1, 2 * n + 1)]
    jobs = train_all(folder, runs, _tell)
    halves = [_half(one, jobs, range(1, n + 1)), _half(one, jobs, range(n + 1, 2 * n + 1))]
    found = alike(*halves)
    write_atomically(folder / "a_a.json", json.dumps(plain({"format": 1, **found}), indent=2) + "\n")
    for line in [*wrapped(a_a_lines(found)), f"a_a.json in {folder}"]:
        _tell(line)
    return int(any(job.done() is None for job in jobs.values()))


def _half(one: Subject, jobs: Mapping[str, Job], seeds: range) -> Entry:
    label = f"{one.label}, seeds {seeds[0]} to {seeds[-1]}"
    return Entry(label, {seed: jobs[_scored(one, 1.0, seed).place] for seed in seeds})
