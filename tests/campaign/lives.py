"""Lives of a tiny run: processes of one or two that train it, and that something may happen to.

A life is a fork of a process that has imported everything, or, as a user starts it, of the launcher that starts two.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.contract.tiny import config, overrides
from tests.pretrained import save_base
from trainer.commands import launch

Faults = Callable[[int], None]  # hears the number of each change to files before it is made

STEPS, SAVE_EVERY = 6, 2
WORDS = [f"num_iterations={STEPS}", f"save_steps={SAVE_EVERY}", "val_loss_every=2", "save_best_model=true"]
WORDS += ["save_total_limit=1", "ema_decay=0.9", "logging_steps=1"]
FORMATS = ("synthetic", "text", "jsonl", "parquet", "bin", "mix")
# Everything that Python writes, links, renames or deletes goes through one of these.
_CALLS = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync")
PATIENCE = 120.0  # seconds of a life on a busy machine, after which it hangs
GRACE = 20.0  # seconds that a process may outlive another of its run, or its launcher


# -- what they train on --------------------------------------------------------------------------------------


def make_text(folder: Path) -> None:
    """The same documents in every format, and a cache beside them, where the lives keep theirs. No kernel is compiled
    for it: that takes longer than a life."""
    import pyarrow as pa
    from pyarrow import parquet

    from data.prepare import Wanted, prepare

    os.environ["MYTRAINER_CACHE"] = str(folder / "cache")
    os.environ["CXX"] = "no-compiler"
    rng = random.Random(0)
    letters = "etaoin shrdlu"
    texts = [f"{n} " + "".join(rng.choices(letters, k=rng.randrange(40, 400))) for n in range(80)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(rows, encoding="utf-8")
    (folder / "notes").mkdir()
    for number, text in enumerate(texts):
        (folder / f"notes/{number}.txt").write_text(text, encoding="utf-8")
    parquet.write_table(pa.table({"text": texts}), folder / "text.parquet")
    cfg, _ = config("gpt2", "data=jsonl", f"train_files={folder}/text.jsonl", "tokenizer=byte")
    prepare(cfg, Wanted(folder / "shards", 1), folder / "cache")


def words_of(type_: str, format_: str, shared: Path) -> list[str]:
    """Those that are a run's own."""
    named = {
        "synthetic": ["data=synthetic"],
        "text": ["data=text", f"input_file={shared}/notes"],
        "jsonl": ["data=jsonl", f"train_files={shared}/text.jsonl"],
        "parquet": ["data=parquet", f"train_files={shared}/text.parquet"],
        "bin": ["data=bin", f"input_file={shared}/shards", "tokenizer=auto"],
        "mix": [
            "data=mix",
            f"mix=[{{data: text, input_file: {shared}/notes, weight: 2}}, {{data: synthetic, weight: 1}}]",
        ],
    }
    words = [*WORDS, *named[format_]]
    cfg, model_cfg = config(type_)
    if "base_model_name" in type(model_cfg).model_fields:
        words.append(f"model_cfg.base_model_name={_base(shared)}")
    return words


def _base(shared: Path) -> Path:
    """A model that others stand on, made by the first that needs it."""
    path = shared / "base"
    if not path.exists():
        made = save_base(shared / f"base-{os.getpid()}")
        with suppress(OSError):  # another was quicker
            made.rename(path)
    return path


# -- one life ------------------------------------------------------------------------------------------------


def life(path: Path, type_: str, words: Sequence[str], faults: Sequence[Faults | None] = (None,)) -> str:
    """One life, of as many processes as there are `faults`; how it ended: "ended", "status N", "traceback" or "hang".
    That of several is how the first of them did, or else the worst."""
    log = path.with_suffix(".log")
    before = log.stat().st_size if log.exists() else 0
    several = _environment(len(faults))
    cfg, model_cfg = config(type_, *words)  # once, not in every life
    changes = {"resume": "auto", "output_dir": str(path)}
    if several:
        changes["num_gpus"] = len(faults)
    cfg = cfg.model_copy(update=changes)
    train = partial(launch.run_here, cfg, model_cfg, path, launch.config_text)
    children = []
    for rank, hears in enumerate(faults):
        child = os.fork()
        if child == 0:
            _live(
                train, log, hears, {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if several else {}
            )
        children.append(child)
    ended = _ended(children)
    with open(log, "rb") as file:
        file.seek(before)
        said = file.read()
    if ended != "hang" and b"Traceback (most recent call last)" in said:
        return "traceback"
    return ended


def _environment(processes: int) -> dict[str, str]:
    """As torchrun sets it."""
    if processes == 1:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = str(processes)
    return {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _live(train: Callable[[], Any], log: Path, faults: Faults | None, environment: dict[str, str]) -> None:
    status = 70  # a traceback
    try:
        os.setsid()
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, errors="backslashreplace")
        os.environ.update(environment)
        if faults is not None:
            _hear(faults)
        train()
        status = 0
    except launch.JobFailed as failed:
        status = failed.say()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _hear(faults: Faults) -> None:
    done = 0

    def around(call: Any, counts: Callable[..., bool] = lambda *_, **__: True) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if counts(*args, **kwargs):
                done += 1
                faults(done)
            return call(*args, **kwargs)

        return wrapped

    for name in _CALLS:
        setattr(os, name, around(getattr(os, name)))
    builtins.open = around(builtins.open, lambda path, mode="r", *_, **__: mode[0] in "wa")


def _ended(children: list[int]) -> str:
    """Wait for all; those that another leaves waiting are ended, as the launcher does."""
    deadline = time.monotonic() + PATIENCE
    codes: dict[int, int] = {}
    grace = PATIENCE
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and grace == PATIENCE:
            grace = GRACE
            deadline = time.monotonic() + grace
        if time.monotonic() > deadline:
            left = [child for child in children if child not in codes]
            for child in left:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            if grace == PATIENCE:
                return "hang"
            break
        time.sleep(0.005)
    found = [codes[child] for child in children if child in codes]
    code = next((code for code in found if code < 0), next((code for code in found if code), 0))
    return {0: "ended", 70: "traceback"}.get(code, f"status {code}")


# -- as a user starts it -------------------------------------------------------------------------------------


def launched(path: Path, type_: str, words: Sequence[str], which: int, seconds: float) -> str:
    """A life of two processes that `num_gpus=2` starts. After so many seconds the launcher gets the signal `which`; one
    of SIGKILL must take the others with it, and any other is a request. How it ended, as `life` has it, or "left
    behind"."""
    log = path.with_suffix(".log")
    given = overrides(type_, *words, "num_gpus=2", f"output_dir={path}", "resume=auto")

    def command() -> None:
        import mytrainer

        sys.argv = ["mytrainer.py"]
        if status := mytrainer.main(given):
            sys.exit(status)

    before = log.stat().st_size if log.exists() else 0
    child = os.fork()
    if child == 0:
        _live(command, log, None, {})
    time.sleep(seconds)
    os.kill(child, which)  # a zombie where it has ended by itself
    ended = _ended([child])
    end = time.monotonic() + GRACE
    while left := list(_workers(path)):
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return "left behind"
        time.sleep(0.05)
    with open(log, "rb") as file:
        file.seek(before)
        if b"Traceback (most recent call last)" in file.read():
            return "traceback"
    return ended


def _workers(path: Path) -> Iterator[int]:
    """Processes that were started to work in this folder."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and os.fsencode(path) in (entry / "cmdline").read_bytes().split(b"\0"):
                yield int(entry.name)
