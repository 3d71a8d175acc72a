"""The jobs of a sweep: `job.json` in the folder of each says what it was asked for, when it ran and how it ended."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.schema import PATHS, RunConfig, redacted
from trainer.run.files import write_atomically

__all__ = ["Job", "digest", "jobs_in", "next_number"]

RECORD = "job.json"
# Where a run lies and what it runs on: no part of what it is, unless a sweep is over them.
PLACES = {"output_dir", "model_name", "resume", "data_root"}
MACHINE = {"device", "num_gpus", "ddp_backend", "torch_compile", "gradient_checkpointing", "batch_size"}


def digest(config: Mapping[str, Any], varied: Iterable[str] = ()) -> str:
    """What a run is, of its fields without places and machine; of other paths the last name counts. `varied` fields
    count in full."""
    whole = set(varied)
    told = {
        name: _last_name(value) if name in PATHS and name not in whole else value
        for name, value in config.items()
        if name in whole or name not in PLACES | MACHINE
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _last_name(value: Any) -> Any:
    if isinstance(value, list):
        return [_last_name(one) for one in value]
    return os.path.basename(value.rstrip("/")) if isinstance(value, str) else value


@dataclasses.dataclass
class Job:
    """One job. `state`: running, ok, failed or stopped; one that runs no more though it says so was killed."""

    place: Path  # its folder in the sweep
    run: Path  # the run's, which may lie elsewhere
    config: dict[str, Any]  # as it was asked for, without secrets
    state: str = "running"
    why: str = ""
    lives: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # host, begin, end in seconds, gpus

    @property
    def number(self) -> int | None:
        """None where the folder is named otherwise."""
        return int(self.place.name) if self.place.name.isdecimal() else None

    def done(self) -> float | None:
        """The score of a job that came to its end: bits per byte."""
        summary = self.summary() if self.state == "ok" else {}
        return summary.get("best", summary["score"])["bits_per_byte"] if summary else None

    def summary(self) -> dict[str, Any]:
        """{} of a run that has not come to its end."""
        path = self.run / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def begin(self) -> None:
        """Raises TrainingError where the record cannot be written."""
        self.state, self.why = "running", ""
        self.lives.append({"host": socket.gethostname(), "begin": time.time(), "end": None, "gpus": []})
        self.write()

    def end(self, state: str, why: str = "") -> None:
        self.state, self.why = state, why
        self.lives[-1]["end"] = time.time()
        self.write()

    def write(self) -> None:
        told = {
            "run": os.path.relpath(self.run, self.place),
            "state": self.state,
            "why": self.why,
            "lives": self.lives,
            "config": self.config,
        }
        write_atomically(self.place / RECORD, json.dumps(told, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Job:
        """Raises ValueError where the record is damaged."""
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            run = Path(os.path.normpath(path.parent / told["run"]))
            return cls(path.parent, run, told["config"], told["state"], told["why"], told["lives"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is no record of a job ({error})") from None

    @classmethod
    def new(cls, place: Path, run: Path, cfg: RunConfig) -> Job:
        return cls(Path(os.path.abspath(place)), Path(os.path.abspath(run)), redacted(cfg))


def jobs_in(sweep: Path) -> list[Job]:
    """Those that have begun, by number, those without one last. Raises ValueError where a record is damaged."""
    found = [Job.read(path) for path in Path(os.path.abspath(sweep)).rglob(RECORD)]
    return sorted(found, key=lambda job: (job.number is None, job.number or 0, str(job.place)))


def next_number(jobs: Iterable[Job]) -> int:
    return max((job.number for job in jobs if job.number is not None), default=-1) + 1
