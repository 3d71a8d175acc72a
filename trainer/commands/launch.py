"""Starting a run: its folder, its processes, its exit status.

One worker, started in four ways: in this process; as several processes where the config asks for them; as one
subprocess per job of a sweep, so that nothing leaks from job to job; or already started by torchrun or accelerate,
in which case rank 0 alone reads the command line and tells the others.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import math
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import OmegaConf

from configs import concealed, trust
from configs.formats.yaml_text import literal
from configs.grammar import in_quotes
from configs.hardware import UNSET, process_count, process_group
from configs.messages import REDACTED, ConfigError
from configs.runs import OUTPUTS, checkpoints
from configs.schema import ModelConfig, RunConfig, redacted
from configs.validate import validate
from data import SOURCES
from naming import load
from trainer.errors import LostPeer, TrainingError, of_a_lost_peer, of_the_machine, sentence
from trainer.signals import hold_stop_signals, pass_on, stop_signals

ROOT = Path(__file__).resolve().parents[2]
# Where the processes of a self-launched run say who they are and how they ended.
_POST = "MYTRAINER_WORKERS"
_KEY = "mytrainer/launch"
_BEGUN = "begun"  # a file of each of them, once it can save and leave when asked to
_LOG = "process-{}.log"  # what each of them said that is for no console


class JobFailed(RuntimeError):
    """A run ended badly. `error` is what a person should read; None where nobody could say, or a traceback has."""

    def __init__(self, status: int, error: Exception | None = None, everywhere: bool = False) -> None:
        """`everywhere`: only this process knows of the error; any other all of them raise."""
        super().__init__(f"the run ended with exit status {status}")
        self.status, self.error, self.everywhere = status, error, everywhere

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.error, self.everywhere)

    @property
    def to_be_said(self) -> bool:
        """Whether it is for this process to say."""
        return self.error is not None and (self.everywhere or rank() == 0)

    def say(self) -> int:
        """Tell the person at the console; the exit status."""
        if self.to_be_said:
            print(f"error: {self.error}", file=sys.stderr)
        return self.status


# -- the run folder ----------------------------------------------------------------------------------------


def run_folder(cfg: RunConfig, named: Path | None = None) -> Path:
    """The folder the settings name, else `outputs/<type>-<date>-<time>-<hex>`."""
    if named is not None:
        return named
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    type_ = cfg.type.rpartition(":")[2]
    return OUTPUTS / f"{type_}-{stamp}-{secrets.token_hex(2)}"


def require_writable(folder: Path) -> None:
    """Create the folder. Raises ConfigError if that, or writing in it, is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"output_dir: cannot write to {folder}: {error.strerror or error}. Choose another output_dir"
        ) from None


def config_text(cfg: RunConfig, origin: str = "", *, of_this_start: bool = False) -> str:
    """The resolved config as a model file that reproduces the run. Secrets of `env` stay out; so does what was asked
    of one start only, unless this is for the workers of that start."""
    lines = ["# The resolved configuration of this run. Running it again reproduces the run."]
    lines += [f"# Composed from {origin}"] if origin else []
    once = {} if of_this_start else {"resume": "none", "eval_only": False}
    said = literal({**redacted(cfg), **once})
    body = OmegaConf.to_yaml(OmegaConf.create({"defaults": ["training", "_self_"], **said}))
    return "\n".join(lines) + "\n" + body


def with_absolute_paths(cfg: RunConfig) -> RunConfig:
    """Relative paths mean the start directory; a run can be gone on with from any other."""
    absolute = SOURCES[cfg.data].absolute
    changes: dict[str, Any] = load(absolute)(cfg) if absolute else {}
    if cfg.data_root is not None:
        changes["data_root"] = os.path.abspath(cfg.data_root)
    elif cfg.input_file is not None:
        changes["input_file"] = os.path.abspath(cfg.input_file)
    if cfg.init_from_checkpoint is not None:
        changes["init_from_checkpoint"] = os.path.abspath(cfg.init_from_checkpoint)
    if Path(cfg.tokenizer).suffix == ".json":
        changes["tokenizer"] = os.path.abspath(cfg.tokenizer)
    return cfg.model_copy(update=changes)


def read_config(path: Path, secret: Mapping[str, Any] | None = None) -> tuple[RunConfig, ModelConfig]:
    """The inverse of `config_text`, from a file. `secret`: fields that it does not show. Raises ConfigError."""
    tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    assert isinstance(tree, dict)
    return validate({str(k): v for k, v in tree.items() if k != "defaults"} | {**(secret or {})})


def apply_env(env: Mapping[str, str], secrets_: Mapping[str, str] | None = None) -> None:
    """Set environment variables; one that is already set wins, with a notice."""
    for name, value in {**env, **(secrets_ or {})}.items():
        present = os.environ.get(name)
        if value == REDACTED:
            if present is None:
                print(f"note: env.{name} was not saved (a secret); set it in your shell", file=sys.stderr)
        elif present is None:
            os.environ[name] = value
        elif present != value and not (secrets_ and name in secrets_):
            print(f"note: env.{name}: the environment has {present!r}, which is kept", file=sys.stderr)
        elif present != value:
            print(f"note: env.{name}: the environment's own value is kept", file=sys.stderr)


# -- starting ------------------------------------------------------------------------------------------------


def start(
    cfg: RunConfig,
    model_cfg: ModelConfig,
    folder: Path,
    *,
    isolated: bool = False,
    origin: str = "",
    said: Path | None = None,
) -> float:
    """Run one training to its end; returns bits per byte (NaN if it was stopped before the first score).

    `isolated`: in a process of its own even if one process is all it takes. `said`: the end of this file has what it
    would print.
    """
    require_writable(folder)
    cfg = with_absolute_paths(cfg)
    if launched():
        _tell(
            {
                "config": cfg.model_dump(mode="json"),
                "folder": str(folder),
                "env": {**_secret_env(cfg), **trust.passed_on(), **concealed.pass_on({})},
            }
        )
        return run_here(cfg, model_cfg, folder, partial(config_text, origin=origin))
    processes = process_count(cfg.num_gpus, cfg.device)
    if processes > 1 or isolated:
        return run_workers(cfg, folder, processes, origin, said)
    return run_here(cfg, model_cfg, folder, partial(config_text, origin=origin))


def run_here(
    cfg: RunConfig, model_cfg: ModelConfig, folder: Path, text: Callable[[RunConfig], str] | None
) -> float:
    """Train in this process. A failure that a person can read is raised as JobFailed: status 2 for the user's mistakes
    that only show once data and model are there, else 1. `text` makes the run's config.yaml."""
    from trainer.loop import train

    if _POST in os.environ:
        hold_stop_signals()  # until `train` listens: one that died of it now would be waited for by the others
        Path(os.environ[_POST], f"{_BEGUN}-{os.environ.get('RANK', '0')}").touch()
    try:
        return train(cfg, model_cfg, folder, text)
    except Exception as error:
        of_this_process = of_the_machine(error)
        if process_group()[1] > 1 and (lost := of_a_lost_peer(error)):
            raise JobFailed(1, LostPeer(lost), everywhere=True) from error
        known = of_this_process or isinstance(error, TrainingError | ValueError | OSError)
        if not known or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        mistake = isinstance(error, ValueError) and not of_this_process
        told = error
        if of_this_process:
            told = TrainingError(of_this_process)
            told.__cause__ = error
        raise JobFailed(2 if mistake else 1, told, everywhere=bool(of_this_process)) from error


def run_workers(cfg: RunConfig, folder: Path, processes: int, origin: str, said: Path | None = None) -> float:
    """Run one training in processes of its own. Raises JobFailed if they failed, SystemExit if they were stopped."""
    received: list[int] = []
    try:
        with tempfile.TemporaryDirectory(prefix="mytrainer-") as post:
            ended = _run_workers(Path(post), cfg, folder, processes, origin, received, said)
            return _outcome(Path(post), folder, ended, received)
    except SystemExit:
        pass_on(received[0])  # here, as it may end a caller's process, and nobody would delete the folder
        raise


def _run_workers(
    post: Path,
    cfg: RunConfig,
    folder: Path,
    processes: int,
    origin: str,
    received: list[int],
    said: Path | None,
) -> Ended:
    """Start the worker(s), pass signals on to them (and take note of those in `received`), wait; how they ended."""
    config = post / "config.yaml"
    config.write_text(config_text(cfg, of_this_start=True), encoding="utf-8")
    command = [sys.executable, str(ROOT / "mytrainer.py"), "worker", str(config), str(folder), origin]
    env = {**os.environ, _POST: str(post), **concealed.pass_on(cfg.model_dump(mode="json"))}
    if processes > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        store = _meeting_place()
        env |= {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port)}
        # Ours, as torchrun has it: no process of the run opens one of its own.
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    children: list[subprocess.Popen[bytes]] = []
    with _forwarding(children, _begun(post, processes), received):
        # Sessions of their own: Ctrl-C in a terminal reaches the workers once, through us. Each has a pipe from us,
        # which closes however we end.
        while len(children) < processes and not received:
            rank = str(len(children))
            own = {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            log = post / _LOG.format(rank) if children else said
            with open(log, "ab") if log else nullcontext() as out:
                worker = subprocess.Popen(
                    command,
                    env={**env, **own},
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            children.append(worker)
        try:
            return _wait(children)
        finally:
            for child in children:
                assert child.stdin is not None
                child.stdin.close()


def _begun(post: Path, processes: int) -> list[Path]:
    return [post / f"{_BEGUN}-{rank}" for rank in range(processes)]


def _meeting_place() -> Any:
    """The store over which the processes of a run find each other, at a port that is taken from now on: one that had
    only been looked up may be another run's by the time it is used."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended: the exit status of the one that failed first, or 0."""

    status: int
    rank: int = 0
    processes: int = 1
    pid: int = 0

    def __str__(self) -> str:
        return f"process {self.rank} of {self.processes} (pid {self.pid})"


def _wait(children: list[subprocess.Popen[bytes]], grace: float = 20.0) -> Ended:
    """Wait for all. When one fails the others usually do so by themselves; one that hangs in an exchange with the dead
    is ended after `grace` seconds."""
    failed, failed_at = Ended(0), math.inf
    while None in [
        child.poll() for child in children
    ]:  # of every one: a failed one is among them at any place
        if not failed.status and (failed := _failed(children)).status:
            failed_at = time.monotonic()
        if time.monotonic() - failed_at > grace:
            for child in children:
                child.kill()
        time.sleep(0.05)
    return failed if failed.status else _failed(children)


def _failed(children: list[subprocess.Popen[bytes]]) -> Ended:
    """Of several that have: one that a signal ended, as the others may only have lost it."""
    found = [
        Ended(child.returncode, rank, len(children), child.pid)
        for rank, child in enumerate(children)
        if child.returncode
    ]
    return min(found, key=lambda ended: ended.status > 0, default=Ended(0))


def _outcome(post: Path, folder: Path, ended: Ended, received: list[int]) -> float:
    """What rank 0 reported; the launcher's own status counts where it could not."""
    result: dict[str, Any] = {}
    report = post / "result.json"
    if report.exists():
        result = json.loads(report.read_text(encoding="utf-8"))
    status = result.get("status", 1) if ended.status else 0
    if received:  # no further job of a sweep is started either
        if not result and len(received) == 1:  # at a second one the processes say it
            print(f"{signal.Signals(received[0]).name} received: nothing was saved", file=sys.stderr)
        raise SystemExit(result.get("status", 128 + received[0]))
    if status or not result:
        raise JobFailed(
            status or 1, _sent(post, "error") or _of_process(post, folder, ended) or _sent(post, "lost")
        )
    score = result["score"]
    return math.nan if score is None else score


def _sent(post: Path, name: str) -> Exception | None:
    """The first error of that name which a process has sent."""
    sent = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(post.glob(f"{name}-*.json"))]
    return _ERRORS[sent[0]["kind"]](sent[0]["text"]) if sent else None


def _of_process(post: Path, folder: Path, ended: Ended) -> TrainingError | None:
    """Of a process that could not say itself how it ended, or not on the console, with where its log lies from now on.
    None where a traceback has said it."""
    if ended.status >= 0 and (ended.rank == 0 or (post / f"lost-{ended.rank}.json").exists()):
        return None
    how = f"failed with status {ended.status}"
    if ended.status < 0:
        name = signal.Signals(-ended.status).name
        memory = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        how = f"was ended by {name}{memory}"
    log = _keep_log(post, folder, ended.rank)
    saved = checkpoints(folder)
    again = " ".join([in_quotes("resume", folder), *trust.repeated(trust.trusted())])
    kept = f"{again} goes on from {saved[-1].name}" if saved else "Nothing had been saved"
    return TrainingError(f"{ended} {how}.{log} {kept}")


def _keep_log(post: Path, folder: Path, rank: int) -> str:
    """Put the log of a process into the run folder: a sentence on where that is, behind a space."""
    log = folder / _LOG.format(rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(post / log.name, log)
    except OSError:
        return ""
    return f" Its log is {log}."


# How the error of a worker process travels; what it derives from counts.
_ERRORS: dict[str, type[Exception]] = {
    "ConfigError": ConfigError,
    "TrainingError": TrainingError,
    "ValueError": ValueError,
    "OSError": OSError,
}


def _send(post: Path, name: str, content: dict[str, Any]) -> None:
    (post / f"{name}.part").write_text(json.dumps(content), encoding="utf-8")
    os.replace(post / f"{name}.part", post / f"{name}.json")


def _send_error(post: Path, error: Exception) -> None:
    kind = next(name for name, type_ in _ERRORS.items() if isinstance(error, type_))
    name = "lost" if isinstance(error, LostPeer) else "error"
    _send(post, f"{name}-{rank()}", {"kind": kind, "text": str(error)})


@contextmanager
def _forwarding(
    children: list[subprocess.Popen[bytes]], begun: list[Path], received: list[int]
) -> Iterator[None]:
    """While open, what asks to stop goes to the worker processes; those that are not all there yet (`begun`: a file of
    each) cannot agree on anything, and have nothing to lose. `received` fills with the signals."""

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        together = all(path.exists() for path in begun)
        for child in children:
            if child.poll() is None:
                child.send_signal(number) if together else child.kill()

    try:
        previous = {n: signal.signal(n, forward) for n in stop_signals()}
    except ValueError:  # not the main thread (a sweep launcher's): nobody sends it signals
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def worker_main(argv: list[str]) -> int:
    """`worker <config.yaml> <run folder> <origin>`: one process of a run that `run_workers` started."""
    config, folder, origin = Path(argv[0]), Path(argv[1]), argv[2]
    post = Path(os.environ[_POST])
    orphaned = threading.Event()
    threading.Thread(target=_end_with_parent, args=(post, orphaned), name="parent", daemon=True).start()
    status, score = 1, math.nan
    secret = concealed.take_over()
    with open(post / _LOG.format(rank()), "a", encoding="utf-8") as log:
        print(f"process {rank()} of {process_group()[1]} begins", file=log, flush=True)
        faulthandler.enable(log)
        try:
            env = OmegaConf.to_container(OmegaConf.load(config), resolve=True).get("env") or {}  # type: ignore[union-attr]
            apply_env(env)
            score = run_here(*read_config(config, secret), folder, partial(config_text, origin=origin))
            status = 0
        except (JobFailed, ConfigError) as error:  # whoever started us says it
            failed = error if isinstance(error, JobFailed) else JobFailed(2, error)
            status = failed.status
            if failed.error is not None and failed.to_be_said:
                _send_error(post, failed.error)
                traceback.print_exception(failed, file=log)
        except SystemExit as leaving:  # asked to stop, with nothing saved
            status = leaving.code if isinstance(leaving.code, int) else 1
        finally:
            faulthandler.disable()
            if rank() == 0:
                _send(post, "result", {"status": status, "score": None if math.isnan(score) else score})
    if orphaned.is_set():  # nobody else deletes it
        shutil.rmtree(post, ignore_errors=True)
    return status


def _end_with_parent(post: Path, orphaned: threading.Event) -> None:
    """Save and leave when whoever started this process has ended, by whatever: its end of our standard input closes.
    Where the processes are not all there yet they have nothing to lose, and would wait for each other."""
    hold_stop_signals()  # what the launcher passes on is for the main thread to hear
    while os.read(0, 1):
        pass
    orphaned.set()
    if all(path.exists() for path in _begun(post, process_group()[1])):
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)
    else:
        os._exit(128 + signal.SIGTERM)


# -- under torchrun or accelerate ----------------------------------------------------------------------------


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return process_group()[1] > 1


def rank() -> int:
    return process_group()[0]


_told = False
_store_: Any = None


def _store() -> Any:
    """The launcher's key-value store. Kept open: rank 0 may be its host."""
    global _store_
    if _store_ is None:
        from torch.distributed import PrefixStore

        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _store_ = PrefixStore(f"{_KEY}/{restart}", _meet())
    return _store_


def _meet(minutes: float = 10.0, patience: float = 15.0) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT, when all processes are there. Raises TrainingError where they do not come.

    In a thread, as torch waits without looking at signals; after `patience` seconds it is said what is waited for.
    """
    from torch.distributed import rendezvous

    met: queue.Queue[Any] = queue.Queue()

    def wait() -> None:
        try:
            met.put(next(rendezvous("env://", timeout=datetime.timedelta(minutes=minutes)))[0])
        except Exception as error:
            met.put(error)

    threading.Thread(target=wait, name="rendezvous", daemon=True).start()
    mine, size = process_group()
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    waiting = f"process {mine} of {size} waits for the others at {place}"
    try:
        store = met.get(timeout=patience)
    except queue.Empty:
        print(f"note: {waiting}, as RANK and WORLD_SIZE say. {UNSET}", file=sys.stderr, flush=True)
        store = met.get()
    if isinstance(store, Exception):
        raise TrainingError(
            f"{waiting} in vain: {sentence(store)}. Another run may hold the port (MASTER_PORT), or not all processes "
            f"were started. {UNSET}"
        ) from store
    return store


def _tell(message: dict[str, Any]) -> None:
    global _told
    _told = True
    _store().set("message", json.dumps(message))


@contextmanager
def leading() -> Iterator[None]:
    """Around everything rank 0 does before the run: if it leaves early, so do the others."""
    if not launched():
        yield
        return
    status = 1
    try:
        yield
        status = 0
    except ConfigError:
        status = 2
        raise
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        raise
    finally:
        if not _told:
            _tell({"exit": status})
            _wait_for_readers()


def _wait_for_readers() -> None:
    """Rank 0 may host the store: it stays until every other rank has read the message."""
    names = [f"read-{r}" for r in range(1, process_group()[1])]
    try:
        _store().wait(names, datetime.timedelta(seconds=60))
    except Exception as error:
        print(f"note: not every process heard that this run ends: {error}", file=sys.stderr)


def follow() -> int:
    """Ranks other than 0: wait for rank 0's decision and take part in its run."""
    store = _store()
    message = json.loads(store.get("message"))
    store.set(f"read-{rank()}", "1")
    if "exit" in message:
        return message["exit"]
    cfg, folder = RunConfig.model_validate(message["config"]), Path(message["folder"])
    for name, value in {**cfg.env, **message["env"]}.items():
        if value != REDACTED:
            os.environ.setdefault(name, value)
    concealed.take_over()
    cfg, model_cfg = validate(cfg.model_dump(mode="json"))
    try:
        run_here(cfg, model_cfg, folder, None)  # rank 0 writes the config
    except JobFailed as failed:
        return failed.say()
    return 0


def _secret_env(cfg: RunConfig) -> dict[str, str]:
    """Secrets by name, for the other ranks' environment only; they travel through memory, not files."""
    return {k: os.environ[k] for k, v in cfg.env.items() if v == REDACTED and k in os.environ}
