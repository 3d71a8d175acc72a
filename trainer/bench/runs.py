"""The runs of a comparison: composed and checked whole, trained one after the other, each in a process of its own, and
found again where the comparison goes on."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from configs import trust
from configs.compose import check, prepare_one, tree_of
from configs.messages import ConfigError
from configs.schema import ModelConfig, RunConfig, redacted
from naming import shorten
from trainer.commands import launch
from trainer.errors import TrainingError
from trainer.sweep.jobs import RECORD, Job, digest
from trainer.view.format import duration

__all__ = ["Run", "Subject", "find_jobs", "label_of", "of_one_folder", "say_notices", "subject", "train_all"]

LOG = "console.txt"  # what a run prints
# Fields that a comparison decides by itself.
DECIDED = ("seed", "output_dir", "model_name", "resume", "eval_only")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A configuration that is compared with others."""

    label: str
    cfg: RunConfig
    model_cfg: ModelConfig
    origin: str
    words: tuple[str, ...]  # those that were given with it
    notices: tuple[str, ...] = ()  # remarks that stop nothing

    def changed(self, **fields: Any) -> Subject:
        """With other generic fields."""
        return dataclasses.replace(self, cfg=self.cfg.model_copy(update=fields))


@dataclasses.dataclass(frozen=True)
class Run:
    """A subject with a seed, and what its folder is called in the comparison's."""

    place: str
    subject: Subject

    @property
    def cfg(self) -> RunConfig:
        return self.subject.cfg


def subject(label: str, model: str, words: Sequence[str], decided: Iterable[str] = ()) -> Subject:
    """Compose and check what a model file and words of the command line come to. Raises ConfigError, also for a word
    that sets what a comparison `decided` itself."""
    plan = prepare_one([f"--hydra_model_cfg={model}", *words])
    if taken := sorted(plan.request.keys & {*DECIDED, *decided}):
        raise ConfigError(
            f"command line: {', '.join(taken)}: this command decides it for every run. Leave it out"
        )
    launch.apply_env({}, plan.secrets)
    trust.pass_on(plan.trusted)
    checked = check(plan, tree_of(plan))
    if why := checked.model_cfg.lacking():
        raise ConfigError(f"{label}: {why}")
    if checked.folder:
        raise ConfigError(
            f"{model}: names the folder of its run, {checked.folder}, which several would share. Leave model_name and "
            "output_dir out of it"
        )
    notices = tuple(dict.fromkeys(plan.notices))
    return Subject(label, checked.cfg, checked.model_cfg, checked.origin, tuple(words), notices)


def say_notices(subjects: Sequence[Subject]) -> None:
    """Each remark once, with those that it is of where it is not of all."""
    of: dict[str, list[str]] = {}
    for one in subjects:
        for text in one.notices:
            of.setdefault(text, []).append(one.label)
    for text, labels in of.items():
        whose = "" if len(labels) == len(subjects) else f"{shorten(labels)}: "
        print(f"note: {whose}{text}", file=sys.stderr)


@contextmanager
def of_one_folder(folder: Path) -> Iterator[None]:
    """While open, no other command compares in this folder. ConfigError where one does, or it is a run's."""
    if (folder / "manifest.json").exists():
        raise ConfigError(f"output: {folder} is the folder of a run. Give another")
    launch.require_writable(folder)
    lock = filelock.FileLock(str(folder / ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(f"output: another command is comparing in {folder}. Wait for it") from None
    try:
        yield
    finally:
        lock.release()


def find_jobs(folder: Path, runs: Iterable[Run]) -> dict[str, Job]:
    """What the folder has of these already, by place. ConfigError where a place holds a run of other settings."""
    found: dict[str, Job] = {}
    problems = []
    for run in runs:
        record = folder / run.place / RECORD
        if not record.is_file():
            continue
        try:
            job = Job.read(record)
        except ValueError as error:
            raise ConfigError(f"output: {error}. Move its folder away") from None
        asked = redacted(run.cfg)
        if digest(job.config) != digest(asked):
            problems.append(f"{run.place} was {_difference(job.config, asked)}")
        found[run.place] = job
    if problems:
        more = f", and {len(problems) - 1} more differ" if len(problems) > 1 else ""
        raise ConfigError(
            f"output: {folder} holds runs of other settings: {problems[0]}{more}. Choose another --output"
        )
    return found


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first field, in the order of their names, that makes two configurations two runs."""
    for name in sorted({*old, *new}):
        if digest({name: old.get(name)}) != digest({name: new.get(name)}):
            return f"of {name}={old.get(name)}, and is asked for with {new.get(name)}"
    return "another run"


def train_all(
    folder: Path, runs: Sequence[Run], tell: Callable[[str], object], known: Mapping[str, Job] | None = None
) -> dict[str, Job]:
    """Train those that have not come to their end, in the order given; all jobs by place. One that fails leaves others
    alone. SystemExit where it is asked to stop: the run has been saved, and goes on with the same command."""
    jobs = dict(find_jobs(folder, runs) if known is None else known)
    for number, run in enumerate(runs, 1):
        job = jobs.get(run.place)
        if job is None or job.done() is None:
            tell(f"[{number}/{len(runs)}] {run.place} ...")
            job = jobs[run.place] = _trained(folder, run, job)
            tell(f"[{number}/{len(runs)}] {run.place}: {_told(job)}")
    return jobs


def _told(job: Job) -> str:
    score = job.done()
    if score is None:
        return f"{job.state}: {job.why}"
    summary = job.summary()
    bound = "<= " if summary["score"]["kind"] == "bound" else ""
    return f"{bound}{score:.4f} bits per byte, {summary['steps']:,} steps in {duration(summary['seconds'])}"


def _trained(folder: Path, run: Run, job: Job | None) -> Job:
    cfg = run.cfg
    if job is None:
        job = Job.new(folder / run.place, folder / run.place, cfg)
    else:  # one that was cut short, or failed for a reason that may be gone
        cfg = cfg.model_copy(update={"resume": "auto", "output_dir": str(job.run)})
    job.begin()
    try:
        score = launch.start(
            cfg,
            run.subject.model_cfg,
            job.run,
            isolated=True,
            origin=run.subject.origin,
            said=job.place / LOG,
        )
    except launch.JobFailed as failed:
        job.end("failed", str(failed.error or f"{failed}; see {job.place / LOG}"))
    except (TrainingError, ConfigError) as error:
        job.end("failed", str(error))
    except BaseException:
        job.end("stopped", "asked to stop")
        raise
    else:
        if not job.summary():
            job.end("stopped", "stopped before its end")
        else:
            good = math.isfinite(score)
            job.end("ok" if good else "failed", "" if good else f"its score is {score}")
    return job


def label_of(model: str) -> str:
    """What a model file is called in tables."""
    return Path(model).stem if "/" in model or model.endswith((".yaml", ".yml", ".json")) else model
