"""Run folders of strangers, and of disks that failed: one file damaged or forged, then the commands that read it.

What is damaged by accident (no digest made to match) may cost at most the newest checkpoint, and must be named; what is
forged may be anything, and must run nothing.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.campaign import hostile
from tests.campaign.command import CLEAN, OK, Said, outcome, say
from tests.campaign.compare import contents
from tests.campaign.jail import SHARED, Campaign, Watch
from tests.campaign.lives import STEPS, life, make_text, words_of
from tests.contract.tiny import TYPES
from trainer.run.checkpoint import DIGESTS, write_digests, write_file

LOST, SILENT, UNMADE = "another result", "says nothing", "not made"
ROUNDS = 3  # cases of an architecture before the next one's turn: its run is made once
# They say in a manifest where a run was made, and how well other programs compress its text.
PROGRAMS = ("git", "uname", f"{sys.executable} -m data.yardsticks", f"{sys.executable} -m data.encoder")


@dataclass(frozen=True)
class Case:
    kind: str  # what is done to a file
    type_: str
    seed: str  # of the choice of file and of what is put there
    commands: tuple[str, ...]

    def __str__(self) -> str:
        return f"--- {self.type_}: {self.kind}, then {', '.join(self.commands)}"


def make(seed: int, number: int) -> Case:
    rng = random.Random(f"{seed} {number}")
    type_ = TYPES[(number // ROUNDS + 7 * seed) % len(TYPES)]
    kind = rng.choice([*ACCIDENTS, *FORGERIES])
    return Case(kind, type_, f"{seed} {number} file", tuple(rng.sample([*COMMANDS], 2)))


# -- what is done to a file ----------------------------------------------------------------------------------


def _in_place(path: Path, change: Callable[[bytes], bytes]) -> None:
    """As a failing disk does: under all names of the file."""
    path.write_bytes(change(path.read_bytes()))


def _flip(rng: random.Random, path: Path) -> None:
    def change(data: bytes) -> bytes:
        if not data:
            return b"\0"
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]

    _in_place(path, change)


def _other(make: Callable[[Path], object]) -> Callable[[random.Random, Path], None]:
    """Something else under the name of a file."""

    def put(rng: random.Random, path: Path) -> None:
        path.unlink()
        make(path)

    return put


def _device(path: Path) -> None:
    try:
        os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        path.symlink_to("/dev/zero")


ACCIDENTS: dict[str, Callable[[random.Random, Path], None]] = {
    "cut": lambda rng, path: os.truncate(path, rng.randrange(path.stat().st_size + 1)),
    "one bit": _flip,
    "zeros": lambda rng, path: _in_place(path, lambda data: b"\0" * len(data)),
    "garbage": lambda rng, path: _in_place(path, lambda data: hostile.random_bytes(rng)),
    "text changed": lambda rng, path: _in_place(path, lambda data: hostile.mutated(rng, data)),
    "deleted": _other(lambda path: None),
    "empty": _other(lambda path: path.touch()),
    "FIFO": _other(os.mkfifo),
    "device": _other(_device),
    "folder": _other(lambda path: path.mkdir()),
    "link to a device": _other(lambda path: path.symlink_to("/dev/zero")),
    "link elsewhere": _other(lambda path: path.symlink_to("/etc/passwd")),
    "link to nothing": _other(lambda path: path.symlink_to(path.with_name("nothing"))),
    "link to itself": _other(lambda path: path.symlink_to(path.name)),
}


class _Bait:
    """What a pickle of somebody else runs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({hostile.MARKER!r}, 'w').close()",)


def _of_code(rng: random.Random, path: Path) -> bytes:
    if path.suffix == ".json":
        content = json.loads(path.read_bytes())
        name = rng.choice(["type", "model_adapter"])
        return json.dumps(
            {**content, name: rng.choice(["bait:Model", "bait", "bait.run", "./bait.py:Model"])}
        ).encode()
    if rng.random() < 0.5:
        return pickle.dumps(_Bait())
    return _saved({"model": _Bait(), "weights": torch.zeros(2)})


def _of_text(rng: random.Random, path: Path) -> bytes:
    if path.suffix == ".pt":
        return _saved(
            rng.choice([[], None, 1, "x", {}, {"model": {}}, torch.zeros(3), {1: 2}, {"a": torch.ones(2)}])
        )
    return hostile.mutated(rng, path.read_bytes())


def _of_values(rng: random.Random, path: Path) -> bytes:
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        _replace(rng, content, _hostile_tensor)
        return _saved(content)
    content = json.loads(path.read_bytes())
    _replace(rng, content, lambda rng, value: hostile.value(rng))
    return json.dumps(content).encode("utf-8", "surrogatepass")


FORGERIES: dict[str, Callable[[random.Random, Path], bytes]] = {
    "forged: another text": _of_text,
    "forged: a value": _of_values,
    "forged: code": _of_code,
}


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _replace(rng: random.Random, tree: Any, other: Callable[[random.Random, Any], Any]) -> None:
    """Change, delete or add one entry somewhere in a tree."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = rng.choice(keys)
        inner = tree[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            tree = inner
            continue
        pick = rng.random()
        if pick < 0.2:
            del tree[key]
        elif pick < 0.3 and isinstance(tree, dict):
            tree[rng.choice(["new", hostile.key(rng)])] = inner
        else:
            tree[key] = other(rng, inner)
        return


def _hostile_tensor(rng: random.Random, value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or rng.random() < 0.3:
        return rng.choice([None, 0, -1, 1e400, 1 << 70, "x", [], {}, torch.zeros(()), torch.zeros(0), True])
    return rng.choice(
        [
            torch.full_like(value, float("nan")) if value.is_floating_point() else value - 1000,
            value[None],
            value.flatten()[:1],
            value.double(),
            value.to(torch.complex64),
            value.bool(),
            value.to_sparse() if value.ndim else value,
            torch.zeros(1).expand(1 << 20, 1 << 20),
            value.t() if value.ndim == 2 else value,
        ]
    )


def _forge(checkpoint: Path, name: str, content: bytes) -> None:
    """Another file under this name, with a digest that matches where there are digests."""
    (checkpoint / name).unlink()
    digest = write_file(checkpoint / name, content)
    if (checkpoint / DIGESTS).exists() and name != DIGESTS:
        digests = json.loads((checkpoint / DIGESTS).read_bytes())
        (checkpoint / DIGESTS).unlink()
        write_digests(checkpoint, {**digests, name: digest} if name in digests else digests)


def _files(path: Path, kind: str) -> list[Path]:
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.is_symlink()]
    of_checkpoints = [file for file in found if file.parent.name.startswith("checkpoint-")]
    pool = found + 2 * of_checkpoints
    if kind == "forged: code":
        return [file for file in pool if file.suffix in (".json", ".pt")]
    return [file for file in pool if file.suffix in (".json", ".pt")] if kind == "forged: a value" else pool


# -- what is done with the folder ----------------------------------------------------------------------------

COMMANDS: dict[str, list[str]] = {
    "resume": ["resume=run"],
    "resume of a checkpoint": [f"resume=run/checkpoint-{STEPS}"],
    "start from its weights": [
        "--hydra_model_cfg=run/config.yaml",
        "init_from_checkpoint=run",
        "output_dir=new",
    ],
    "its config": ["--hydra_model_cfg=run/config.yaml", "output_dir=new"],
    "eval": ["eval", "--checkpoint", "run", "--output", "eval.json"],
    "eval of the best": ["eval", "--checkpoint", "run/best_model"],
    "generate": ["generate", "--checkpoint", "run", "--max_new_tokens", "4"],
    "generate of the final": ["generate", "--checkpoint", "run/final_model", "--max_new_tokens", "4"],
    "export": ["export", "--checkpoint", "run", "--to", "safetensors", "--output", "new"],
    "show": ["show", "--hydra_model_cfg=run/config.yaml"],
}


def try_(case: Case, folder: Path, watch: Watch) -> tuple[str, str, dict[str, int]]:
    shared = folder.parent / SHARED
    words = words_of(case.type_, "jsonl", shared)
    whole = _whole(case.type_, words, shared)
    rng = random.Random(case.seed)
    counts = Counter({f"of {case.type_}": 1})
    first = (OK, "")
    for name in case.commands:
        path = _copied(whole, folder / name / "run")
        state = rng.getstate()
        file = rng.choice(_files(path, case.kind))
        inner = file.relative_to(path)
        try:
            if case.kind in ACCIDENTS:
                ACCIDENTS[case.kind](rng, file)
            else:
                _forge(file.parent, file.name, FORGERIES[case.kind](rng, file))
        except (ValueError, AttributeError, TypeError, RuntimeError) as error:  # not of a file like this
            return UNMADE, f"{case.kind} of {inner}: {error!r}", dict(counts)
        rng.setstate(state)  # the same for the next command
        said, (found, detail) = _say(name, path.parent, watch)
        if found in (OK, CLEAN) and case.kind in ACCIDENTS:
            found, detail = _after_an_accident(name, said, path, inner, whole, found)
        counts[f"{name}: {found}"] += 1
        if found not in (OK, CLEAN):
            return found, f"{inner}, {name}: {detail}", dict(counts)
        first = (found, detail) if found == CLEAN else first
    return (*first, dict(counts))


def _say(name: str, folder: Path, watch: Watch) -> tuple[Said, tuple[str, str]]:
    given = list(COMMANDS[name])
    if name in ("start from its weights", "its config"):
        given += ["num_iterations=1"]
    (folder / "bait.py").write_text(hostile.BAIT, encoding="utf-8")
    os.chdir(folder)
    said = say(given, folder, watch, also=(folder.parent.parent / SHARED,), programs=PROGRAMS)
    found = outcome(said, folder, watch, (1, 2))
    os.chdir(folder.parent)
    return said, found


def _after_an_accident(
    name: str, said: Said, path: Path, inner: Path, whole: Path, found: str
) -> tuple[str, str]:
    """Whether a sound result came of a folder whose damage its digests show."""
    if not inner.parts[0].startswith("checkpoint-") or name not in ("resume", "eval"):
        return found, ""
    last = f"checkpoint-{STEPS}"
    if found == CLEAN:
        return LOST, f"two sound checkpoints were there: {said.err.strip()[-300:]}"
    if (
        inner.parts[0] == last
        and inner.name not in said.err
        and last not in said.err
        and not _same(path, whole, inner)
    ):
        return SILENT, said.err.strip()[-300:]
    if name == "resume":
        expected, now = contents(whole / last), contents(path / last)
        differ = sorted(n for n in expected if now.get(n) != expected[n])
        return (LOST, f"differs: {differ}") if differ else (OK, "")
    written = json.loads((path.parent / "eval.json").read_text(encoding="utf-8"))
    score, scores = written["score"]["bits_per_byte"], _scores(whole)
    return (
        (OK, "") if any(abs(score - s) < 1e-5 for s in scores) else (LOST, f"score {score}, not of {scores}")
    )


def _same(path: Path, whole: Path, inner: Path) -> bool:
    """Whether the accident did nothing."""
    with suppress(OSError):
        file = path / inner
        return file.is_file() and not file.is_symlink() and file.read_bytes() == (whole / inner).read_bytes()
    return False


def _scores(whole: Path) -> list[float]:
    lines = map(json.loads, (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["val_bits_per_byte"] for line in lines if line.get("val_bits_per_byte") is not None]


# -- the folder ----------------------------------------------------------------------------------------------


def _whole(type_: str, words: list[str], shared: Path) -> Path:
    """A run with three checkpoints, made by the first case that needs it."""
    path = shared / f"run-{type_}"
    if not path.exists():
        mine = shared / f"{path.name}-{os.getpid()}"
        if (ended := life(mine, type_, [*words, "save_total_limit=3"])) != "ended":
            raise RuntimeError(f"{type_} {ended}: {mine.with_suffix('.log').read_text()[-2000:]}")
        with suppress(OSError):  # another was quicker
            mine.rename(path)
    return path


def _copied(whole: Path, path: Path) -> Path:
    """A copy in which files that share a place on the disk do so too."""
    places: dict[int, Path] = {}
    for file in sorted(whole.rglob("*")):
        new = path / file.relative_to(whole)
        new.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            new.mkdir(exist_ok=True)
        elif (there := places.setdefault(file.stat().st_ino, new)) != new:
            os.link(there, new)
        else:
            shutil.copyfile(file, new)
    return path


def _prepare(shared: Path) -> None:
    torch.set_num_threads(1)
    hostile.prepare(shared)
    if not (shared / "shards").exists():
        make_text(shared)


CAMPAIGN = Campaign(make, try_, (OK, CLEAN, UNMADE), _prepare, patience=4, life=30)
