"""Runs that something happens to: killed, asked to stop, or with a disk that fails.

A run is killed (SIGKILL) before one of its changes to files, or at a moment, asked to stop there, or has an operation
fail; it is gone on with, and that again, until it ends. Then every file of its folder is compared with those of the
same run that nothing happened to. Architectures and forms of text take turns; some runs are of two processes, and of
those some are started by the launcher, which is killed.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.campaign.compare import contents, differences, room
from tests.campaign.jail import SHARED, Campaign, Watch
from tests.campaign.lives import FORMATS, SAVE_EVERY, Faults, launched, life, make_text, words_of
from tests.contract.tiny import TYPES
from trainer.run.checkpoint import checkpoints_in, damage

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
ROUNDS = 4  # through all architectures before each takes another form of text
OK, WRONG = "as if nothing had happened", "wrong"


@dataclass(frozen=True)
class Fault:
    """What happens in a life. `at`: after which part of a whole run's operations, or of its time; `what`: a signal or
    an errno; `rank`: in which process."""

    kind: str
    at: float
    what: int = 0
    rank: int = 0

    def __str__(self) -> str:
        what = {"error": errno.errorcode.get(self.what, ""), "operation": "SIGKILL", "moment": "SIGKILL"}
        name = what.get(self.kind) or signal.Signals(self.what).name
        return f"{name} ({self.kind}) at {self.at:.3f} in process {self.rank}"


@dataclass(frozen=True)
class Case:
    kind: str  # the architecture
    format: str
    processes: int
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        lives = "\n".join(map(str, self.faults))
        return f"--- {self.kind} on {self.format}, {self.processes} process(es)\n{lives}"


def make(seed: int, number: int) -> Case:
    rng = random.Random(f"{seed} {number}")
    place = number % len(TYPES)
    format_ = FORMATS[(place + number // (ROUNDS * len(TYPES)) + seed) % len(FORMATS)]
    processes = 2 if number % 7 == 3 else 1  # of every architecture in turn
    faults = tuple(_fault(rng, processes) for _ in range(rng.randint(1, 5)))
    return Case(TYPES[place], format_, processes, faults)


def _fault(rng: random.Random, processes: int) -> Fault:
    kind = rng.choice(["operation", "operation", "operation", "moment", "signal", "error"])
    if processes > 1 and rng.random() < 0.25:
        return Fault("launcher", rng.random(), rng.choice([signal.SIGKILL, *SIGNALS]))
    if kind == "signal":
        return Fault(kind, rng.random(), rng.choice(SIGNALS), rng.randrange(processes))
    if kind == "moment":
        return Fault(kind, rng.random(), rank=rng.randrange(processes))
    return Fault(kind, rng.random(), rng.choice(ERRORS) if kind == "error" else 0)  # process 0 writes


# -- what happens to a run -----------------------------------------------------------------------------------


def _killed_at(number: int) -> Faults:
    return lambda done: os.kill(os.getpid(), signal.SIGKILL) if done == number else None


def _asked_after(seconds: float, which: int) -> Faults:
    """At a moment, in whatever phase: the timer is the kernel's, and a handler makes that signal of its."""

    def ask(number: int, frame: object) -> None:
        os.kill(os.getpid(), which)

    def start() -> None:
        signal.signal(signal.SIGALRM, ask)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return _at_first(start)


def _failing_at(number: int, code: int) -> Faults:
    def fail(done: int) -> None:
        if done == number:
            raise OSError(code, os.strerror(code))

    return fail


def _killed_after(seconds: float) -> Faults:
    """At a moment, whatever the process is busy with: the timer is the kernel's."""

    def start() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return _at_first(start)


def _at_first(start: Callable[[], None]) -> Faults:
    begun = [False]

    def hear(done: int) -> None:
        if not begun[0]:
            begun[0] = True
            start()

    return hear


def _faults(fault: Fault, whole: Whole, life_: int) -> Faults:
    """Later lives have less left to do."""
    number = 1 + int(fault.at * whole.operations / (1 + life_))
    seconds = 0.001 + fault.at * whole.seconds / (1 + life_)
    if fault.kind == "operation":
        return _killed_at(number)
    if fault.kind == "moment":
        return _killed_after(seconds)
    return _asked_after(seconds, fault.what) if fault.kind == "signal" else _failing_at(number, fault.what)


# -- a campaign ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A run that nothing happens to."""

    path: Path
    operations: int
    seconds: float
    room: int


def whole_run(case: Case, words: list[str], shared: Path) -> Whole:
    """Of this architecture, text and number of processes: made by the first case that needs it."""
    path = shared / f"whole-{case.kind}-{case.format}-{case.processes}"
    facts = path.with_suffix(".json")
    if not facts.exists():
        mine = shared / f"{path.name}-{os.getpid()}"
        count = mine.with_suffix(".count")
        began = time.monotonic()

        def counted(done: int) -> None:
            count.touch()
            os.truncate(count, done)

        if (ended := life(mine, case.kind, words, (counted, *[None] * (case.processes - 1)))) != "ended":
            raise RuntimeError(
                f"{path.name} {ended} by itself: {mine.with_suffix('.log').read_text()[-2000:]}"
            )
        seconds = time.monotonic() - began
        if not path.exists():  # another worker may have been quicker
            mine.rename(path)
            found = {"operations": count.stat().st_size, "seconds": seconds, "room": room(path)}
            part = facts.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(found), encoding="utf-8")
            part.rename(facts)
    return Whole(path, **json.loads(facts.read_text(encoding="utf-8")))


def try_(case: Case, folder: Path, watch: Watch) -> tuple[str, str, dict[str, int]]:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    shared, path = folder.parent / SHARED, folder / "run"
    words = words_of(case.kind, case.format, shared)
    whole = whole_run(case, words, shared)
    counts = Counter({f"of {case.format}": 1, f"of {case.processes} processes": 1})
    wrong: list[str] = []
    for number, fault in enumerate(case.faults):
        before = _newest(path)
        if fault.kind == "launcher":
            ended = launched(path, case.kind, words, fault.what, 2 + 12 * fault.at)
        else:
            hears: list[Faults | None] = [None] * case.processes
            hears[fault.rank] = _faults(fault, whole, number)
            ended = life(path, case.kind, words, hears)
        counts[f"{fault.kind}: {'killed' if ended in ('status -9', 'status -14') else ended}"] += 1
        if ended in ("traceback", "hang", "left behind"):
            wrong.append(f"{fault}: {ended}")
        if (newest := _newest(path)) < before:
            wrong.append(f"{fault}: checkpoint-{before} is lost")
        if _reached(path) - newest > SAVE_EVERY:
            wrong.append(f"{fault}: saved step {newest} of {_reached(path)}")
    ended = life(path, case.kind, words, [None] * case.processes)
    counts[f"at last: {ended}"] += 1
    if ended != "ended":
        wrong.append(f"at last: {ended}: {path.with_suffix('.log').read_text(errors='replace')[-300:]!r}")
    else:
        wrong += [f"differs: {name}" for name in differences(path, contents(whole.path))]
    if room(path) > 1.02 * whole.room + 20_000:  # beside them lie lines of lives cut short
        wrong.append(f"{room(path)} bytes instead of {whole.room}")
    return WRONG if wrong else OK, "; ".join(wrong), dict(counts)


def _newest(path: Path) -> int:
    sound = [c for c in checkpoints_in(path) if damage(c) is None]
    return int(sound[-1].name.rpartition("-")[2]) if sound else 0


def _reached(path: Path) -> int:
    """The last step that metrics.jsonl has whole."""
    lines = (
        (path / "metrics.jsonl").read_bytes().split(b"\n")[:-1] if (path / "metrics.jsonl").exists() else []
    )
    return max((json.loads(line).get("step", 0) for line in lines), default=0)


def _prepare(shared: Path) -> None:
    torch.set_num_threads(1)
    if not (shared / "shards").exists():
        make_text(shared)


CAMPAIGN = Campaign(make, try_, (OK,), _prepare, patience=20)
