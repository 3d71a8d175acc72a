"""Forked workers in which cases are tried, and an audit hook that sees what a case does to the machine.

A worker tries case after case. The kernel ends one that computes for too long (`SIGPROF`), its parent one that waits
for too long; the case is then a hang, and another worker goes on with the next. The hook lets nothing happen that it
counts: a case that would write, start or import is stopped there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.campaign.figures import Found

CPU_SECONDS = 10  # of one case; more is a hang
WALL_SECONDS = 60  # the same on a busy machine, where a case waits for something
MORE_MEMORY = 2 << 30  # bytes of address space that a worker may add to what it has
LIFE = 200  # cases of one worker
SHARED = "shared"  # a folder beside those of the cases

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
)
_CHANGES += ("os.chown", "os.utime", "os.setxattr", "shutil.rmtree", "shutil.move", "shutil.copyfile")
_PROCESSES = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
)
_PROCESSES += ("pty.spawn", "socket.connect", "socket.bind", "webbrowser.open", "urllib.Request", "os.kill")
_READERS = ("configs", "yaml", "omegaconf", "hydra")  # packages that read files, and run none


class Stopped(BaseException):
    """Something that no case may do was about to happen."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


@dataclasses.dataclass(frozen=True)
class Campaign:
    """What is tried. `make(seed, number)` gives a case, `try_(case, folder, watch)` its outcome, what was seen and,
    where it counts anything, the counts, in a folder of its own; `good` are the outcomes that nobody has to look at. A
    case has a `kind` and is printed to be read.

    `prepare(folder)` is called once, before the workers are made, with a folder for what cases share: a worker finds it
    as `SHARED` beside its own. `patience` is how much longer than a configuration a case may take, by CPU and by the
    clock."""

    make: Callable[[int, int], Any]
    try_: Callable[[Any, Path, Watch], tuple[Any, ...]]
    good: tuple[str, ...]
    prepare: Callable[[Path], None] = lambda folder: None
    patience: int = 1
    life: int = LIFE

    def shown(self, seed: int, number: int) -> str:
        return str(self.make(seed, number))


class Watch:
    """The audit hook of a worker. It cannot be taken out again, so it belongs into a process of its own."""

    def __init__(self) -> None:
        self.armed = False
        self.folder = Path("/nowhere")
        self.writable: tuple[Path, ...] = ()
        self.programs: tuple[str, ...] = ()
        self.seen: Stopped | None = None
        self.place = Path()  # where it last asked to write
        sys.addaudithook(self._hear)

    def arm(
        self, folder: Path, *, writes: bool, also: tuple[Path, ...] = (), programs: tuple[str, ...] = ()
    ) -> None:
        """From now on. `writes`: whether the case may write within its folder, and in `also`. Modules there are never
        to be run. `programs` are those that it may start, as their first words."""
        self.folder, self.writable, self.programs = folder, (folder, *also) if writes else (), programs
        self.seen, self.armed = None, True

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        outcome = self._of(event, args)
        if outcome:
            self.armed = False  # what is made of it is no case
            self.seen = Stopped(outcome, f"{event} {args[:2]!r}"[:300])
            raise self.seen

    def _of(self, event: str, args: tuple[Any, ...]) -> str:
        """The outcome that an event is, "" for none."""
        if event == "open":
            path, mode, flags = args
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & _WRITING
            return "touched file" if writes and not self._may_write(path) else ""
        if event in _CHANGES:
            return "" if self._may_write(args[0]) else "touched file"
        if event == "subprocess.Popen" and self._may_start(args[1]):
            return ""
        if event == "os.kill" and self.programs and _is_child(args[0]):
            return ""
        if event in _PROCESSES:
            return "executed code"
        if event == "exec":  # of a module's code too, however it is imported
            inside = Path(args[0].co_filename).is_relative_to(self.folder)
            return "executed code" if inside or self._by_a_reader() else ""
        return ""

    def _may_start(self, command: Any) -> bool:
        given = [command] if isinstance(command, str) else [os.fspath(word) for word in command]
        return any(given[: len(words)] == words for words in map(str.split, self.programs))

    def _may_write(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return isinstance(path, int)  # a file that is open already
        self.place = Path(os.path.realpath(os.fsdecode(path)))
        return str(self.place) == os.devnull or any(self.place.is_relative_to(f) for f in self.writable)

    @staticmethod
    def _by_a_reader() -> bool:
        """Whether `exec` or `eval` is called by a package that reads files."""
        caller = sys._getframe(3).f_globals.get("__name__", "")
        return str(caller).partition(".")[0] in _READERS


def _is_child(pid: int) -> bool:
    """Whether this process has started that one."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    return int(stat.rpartition(")")[2].split()[1]) == os.getpid()


def _cpu_seconds(pid: int) -> float:
    """What a process of ours has computed; it may have ended, but not been waited for."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def run(
    campaign: Campaign,
    seed: int,
    numbers: Sequence[int],
    folder: Path,
    workers: int = 1,
    *,
    end: float = math.inf,
    keep: bool = False,
) -> Iterator[Found]:
    """Try these cases; what came of each, in the order in which they end. At `end`, by the monotonic clock, no further
    one begins. `keep`: leave their folders."""
    (folder / SHARED).mkdir(exist_ok=True)
    campaign.prepare(folder / SHARED)
    begun, ends = 0, len(numbers)
    crew: list[_Worker] = []
    waiting: list[int] = []  # left by workers that a case ended
    try:
        while crew or ((waiting or begun < ends) and time.monotonic() < end):
            while (waiting or begun < ends) and len(crew) < workers and time.monotonic() < end:
                if waiting:
                    share, waiting = waiting, []
                else:
                    share = list(numbers[begun : begun + campaign.life])
                    begun += len(share)
                crew.append(_Worker(campaign, seed, share, folder, end, keep))
            ready, _, _ = select.select([w.pipe for w in crew], [], [], 1.0)
            for worker in list(crew):
                yield from worker.heard() if worker.pipe in ready else worker.overdue()
                if worker.ended:
                    crew.remove(worker)
                    waiting += worker.left
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    def __init__(
        self, campaign: Campaign, seed: int, numbers: list[int], folder: Path, end: float, keep: bool
    ) -> None:
        self.campaign, self.seed, self.folder, self.keep = campaign, seed, folder, keep
        self.left = list(numbers)
        self.ended = False
        self.since, self.computed = time.monotonic(), 0.0
        self._rest = b""
        self.pipe, inner = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _live(campaign, seed, numbers, folder, inner, end, keep)
                status = 0
            except BaseException:
                traceback.print_exc()  # of the campaign itself
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(inner)

    def heard(self) -> Iterator[Found]:
        """What the worker has told since."""
        told = os.read(self.pipe, 1 << 16)
        *lines, self._rest = (self._rest + told).split(b"\n")
        for line in lines:
            found = Found(**json.loads(line))
            self.left.remove(found.case)
            self.since, self.computed = time.monotonic(), _cpu_seconds(self.pid)
            yield found
        if not told:
            yield from self._died()

    def overdue(self) -> Iterator[Found]:
        allowed = WALL_SECONDS * self.campaign.patience
        if time.monotonic() - self.since > allowed:
            if (
                computed := _cpu_seconds(self.pid)
            ) > self.computed + 1:  # on a busy machine; it does not wait
                self.since, self.computed = time.monotonic(), computed
                return
            os.kill(self.pid, signal.SIGKILL)
            yield from self._died(f"waited for more than {allowed} s")

    def _died(self, detail: str = "") -> Iterator[Found]:
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pipe)
        self.ended = True
        number = os.waitstatus_to_exitcode(status)
        if self.left and number != 0:  # 0: there was no time for the others
            case = self.left.pop(0)
            if not self.keep:
                shutil.rmtree(self.folder / str(case), ignore_errors=True)
            kind = self.campaign.make(self.seed, case).kind
            computed = f"computed for more than {CPU_SECONDS * self.campaign.patience} s"
            hang = detail or (computed if number == -signal.SIGPROF else "")
            yield Found(
                case, kind, "hang" if hang else "traceback", hang or f"the process ended with {number}"
            )

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pipe)


def _live(
    campaign: Campaign, seed: int, numbers: list[int], folder: Path, pipe: int, end: float, keep: bool
) -> None:
    """A worker's life."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nobody answers a question
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    size = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MORE_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    watch = Watch()
    environment, path, argv = dict(os.environ), list(sys.path), list(sys.argv)
    for number in numbers:
        if time.monotonic() > end:
            return
        case = campaign.make(seed, number)
        inner = folder / str(number)
        inner.mkdir()
        os.chdir(inner)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS * campaign.patience)
        outcome, detail, *counts = campaign.try_(case, inner.resolve(), watch)
        signal.setitimer(signal.ITIMER_PROF, 0)
        watch.armed = False
        os.chdir("/")
        if not keep:
            shutil.rmtree(inner)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:], sys.argv[:] = path, argv
        told = json.dumps(dataclasses.asdict(Found(number, case.kind, outcome, detail, *counts)))
        os.write(pipe, told.encode() + b"\n")
