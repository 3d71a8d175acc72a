"""Runs that are killed: `python -m tests.campaign.kills --minutes 5 --seed 7 --json kills.json`

A run is killed (SIGKILL) before one of its changes to files, or at a moment, asked to stop there, or has an operation
fail; it is gone on with, and killed again now and then, until it ends. Then every file of its folder is compared with
those of the same run that nothing happened to. What happens to run number n is a function of (seed, n). Figures of
further seeds add up in the same file; the exit status is 1 where something was found.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.contract.tiny import config
from trainer.errors import TrainingError
from trainer.loop import train
from trainer.run.checkpoint import checkpoints_in, damage

STEPS, SAVE_EVERY = 6, 2
WORDS = [f"num_iterations={STEPS}", f"save_steps={SAVE_EVERY}", "val_loss_every=2", "save_best_model=true"]
WORDS += ["save_total_limit=1", "ema_decay=0.9", "logging_steps=1"]
TYPES = ("gpt2", "vanilla", "mamba", "mdl")
# Everything that Python writes, links, renames or deletes goes through one of these.
CALLS = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PATIENCE = 120.0  # seconds of a life on a busy machine, after which it hangs
# What may differ: the place, times and what follows from them, memory, the words of the command line, and the kernels,
# which are those of the last life.
TIMED = re.compile(
    r"output_dir|git_|^kernels$|seconds|tokens_per_second|memory|argv|started|date|load_average|mfu|threads|torch"
)
NOT_COMPARED = re.compile(
    r"\.lock|report\.html|.*\.dropped\.(jsonl|txt)|config\.yaml|digests\.json|process-\d+\.log"
)


def life(path: Path, type_: str, faults: Callable[[int], None] | None) -> str:
    """One life of a run in a process of its own, before each of whose changes to files `faults` hears its number; how
    it ended."""
    child = os.fork()
    if child == 0:
        _live(path, type_, faults)
    return _ended(child, time.monotonic() + PATIENCE)


def _live(path: Path, type_: str, faults: Callable[[int], None] | None) -> None:
    status = 70  # a traceback
    try:
        os.setsid()
        with open(path.with_suffix(".log"), "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if faults is not None:
            _hear(faults)
        cfg, model_cfg = config(type_, *WORDS)
        cfg = cfg.model_copy(update={"resume": "auto", "output_dir": str(path)})
        train(cfg, model_cfg, path)
        status = 0
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _hear(faults: Callable[[int], None]) -> None:
    done = 0

    def around(call: Any, counts: Callable[..., bool] = lambda *_, **__: True) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if counts(*args, **kwargs):
                done += 1
                faults(done)
            return call(*args, **kwargs)

        return wrapped

    for name in CALLS:
        setattr(os, name, around(getattr(os, name)))
    builtins.open = around(builtins.open, lambda path, mode="r", *_, **__: mode[0] in "wa")


def _ended(child: int, deadline: float) -> str:
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return {0: "ended", 70: "traceback"}.get(code, f"status {code}")
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hang"
        time.sleep(0.005)


# -- what happens to a run -----------------------------------------------------------------------------------


def _killed_at(number: int) -> Callable[[int], None]:
    return lambda done: os.kill(os.getpid(), signal.SIGKILL) if done == number else None


def _asked_at(number: int, which: int) -> Callable[[int], None]:
    return lambda done: os.kill(os.getpid(), which) if done == number else None


def _failing_at(number: int, code: int) -> Callable[[int], None]:
    def fail(done: int) -> None:
        if done == number:
            raise OSError(code, os.strerror(code))

    return fail


def _killed_after(seconds: float) -> Callable[[int], None]:
    """At a moment, whatever the process is busy with: the timer is the kernel's."""
    signal_at = [False]

    def start(done: int) -> None:
        if not signal_at[0]:
            signal_at[0] = True
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds)

    return start


def fault(rng: random.Random, operations: int, seconds: float) -> tuple[str, Callable[[int], None]]:
    kind = rng.choice(["operation", "operation", "moment", "signal", "error"])
    number = rng.randint(1, operations)
    if kind == "operation":
        return kind, _killed_at(number)
    if kind == "moment":
        return kind, _killed_after(rng.uniform(0.001, seconds))
    if kind == "signal":
        return kind, _asked_at(number, rng.choice(SIGNALS))
    return kind, _failing_at(number, rng.choice(ERRORS))


# -- what is compared ----------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, Any]:
    """Name -> what a file of the folder says, without what may differ."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    named = {str(file.relative_to(path)): file for file in files}
    return {name: _read(file) for name, file in named.items() if not NOT_COMPARED.fullmatch(file.name)}


def _read(file: Path) -> Any:
    if file.suffix == ".pt":
        return _plain(torch.load(file, weights_only=True))
    if file.suffix == ".jsonl":
        return [_plain(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    return _plain(json.loads(file.read_bytes())) if file.suffix == ".json" else file.read_bytes()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not TIMED.search(str(k))}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def differences(path: Path, expected: dict[str, Any]) -> list[str]:
    found = contents(path)
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def room(path: Path) -> int:
    """Bytes on the disk, each file once however many names it has."""
    return sum({(s := file.stat()).st_ino: s.st_size for file in path.rglob("*") if file.is_file()}.values())


# -- a campaign ----------------------------------------------------------------------------------------------


class Campaign:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole: dict[str, tuple[dict[str, Any], int, float, int]] = {}

    def expected(self, type_: str) -> tuple[dict[str, Any], int, float, int]:
        """(contents, changes to files, seconds, bytes) of a run that nothing happens to."""
        if type_ not in self.whole:
            path, count = self.folder / type_, self.folder / f"{type_}.count"
            began = time.monotonic()

            def counted(done: int) -> None:
                count.touch()
                os.truncate(count, done)

            if (ended := life(path, type_, counted)) != "ended":
                raise RuntimeError(
                    f"{type_} {ended} by itself: {path.with_suffix('.log').read_text()[-2000:]}"
                )
            seconds = time.monotonic() - began
            self.whole[type_] = contents(path), count.stat().st_size, seconds, room(path)
        return self.whole[type_]

    def one(self, seed: int, number: int, counts: Counter[str]) -> list[str]:
        """Run number `number`: what is wrong with it."""
        rng = random.Random(f"{seed} {number}")
        type_, path = TYPES[number % len(TYPES)], self.folder / f"run-{number}"
        whole, operations, seconds, bytes_ = self.expected(type_)
        wrong: list[str] = []
        lives = rng.randint(1, 4)
        for _ in range(lives):
            kind, faults = fault(rng, operations, seconds)
            before = _newest(path)
            ended = life(path, type_, faults)
            counts[f"{kind}: {'killed' if ended in ('status -9', 'status -14') else ended}"] += 1
            if ended in ("traceback", "hang") and kind != "error":
                wrong.append(f"{kind}: {ended}")
            if _newest(path) < before:
                wrong.append(f"{kind}: checkpoint-{before} is lost")
        ended = life(path, type_, None)
        counts[f"at last: {ended}"] += 1
        if ended != "ended":
            wrong.append(f"at last: {ended}")
        wrong += [f"differs: {name}" for name in differences(path, whole)]
        if room(path) > 1.02 * bytes_ + 20_000:  # beside them lie lines of lives cut short
            wrong.append(f"{room(path)} bytes instead of {bytes_}")
        if not wrong:
            shutil.rmtree(path)
            path.with_suffix(".log").unlink()
        return wrong


def _newest(path: Path) -> int:
    sound = [c for c in checkpoints_in(path) if damage(c) is None]
    return int(sound[-1].name.rpartition("-")[2]) if sound else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.kills", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=int, help="this one alone, whose folder is kept")
    parser.add_argument("--json", type=Path, help="figures, to which these are added")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    end, counts, bad = time.monotonic() + 60 * args.minutes, Counter[str](), 0
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    campaign, number = Campaign(folder), args.run or 0
    while time.monotonic() < end:
        wrong = campaign.one(args.seed, number, counts)
        counts["runs"] += 1
        counts["runs with something wrong"] += bool(wrong)
        for told in wrong:
            bad += 1
            print(f"--seed {args.seed} --run {number} ({folder}): {told}", flush=True)
        if args.run is not None:
            break
        number += 1
    figures = Counter(json.loads(args.json.read_text()) if args.json and args.json.exists() else {}) + counts
    if args.json:
        args.json.write_text(json.dumps(dict(sorted(figures.items())), indent=1) + "\n")
    print(json.dumps(dict(sorted(figures.items())), indent=1))
    if not bad:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
