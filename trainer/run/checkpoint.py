"""Checkpoints: complete or absent.

`checkpoint-<step>/` is written under a temporary name, every file flushed to disk and digested, and renamed
when it is whole. The newest one is found by reading the folder; one whose digests do not match is named and
skipped. Links (`model.pt` at the top, `best_model/`, `final_model/`) are for people and never read on resume.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from configs.grammar import word
from configs.weights import nothing_at
from naming import command_line, expand_path
from trainer.bench.documents import FILE as DOCUMENTS
from trainer.errors import TrainingError, of_the_machine, sentence
from trainer.run.files import beside, checkpoints_in, discard, new_folder, replace_folder

__all__ = [
    "FORMAT",
    "STATE",
    "NotAsWritten",
    "as_written",
    "checkpoints_in",
    "damage",
    "find_checkpoint",
    "link_files",
    "link_folder",
    "load_json",
    "load_named_tensors",
    "load_tensors",
    "newest_checkpoint",
    "prune",
    "save_checkpoint",
    "write_digests",
    "write_file",
]

FORMAT = 1
DIGESTS = "digests.json"
STATE = "training_state.json"
ALWAYS = ("model.pt", STATE)  # of the files that digests name
OPTIONAL = ("ema.pt",)
Content = bytes | Callable[[Any], object]  # of a file: its bytes, or what writes them to one


class NotAsWritten(ValueError):
    """The content of a checkpoint is other than what was saved, though its digests say that it is not."""


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: dict[str, Any],
    texts: Mapping[str, str | bytes],
    *,
    anew: bool = False,
) -> Path:
    """Write `checkpoint-<step>/`. `tensors`: file name -> what torch.save takes; `texts`: file name -> text, or bytes;
    `anew`: what is there under that name is not to be trusted.

    Raises TrainingError when the disk is full or not writable; whatever was saved before is untouched.
    """
    final = run_dir / f"checkpoint-{step}"
    if (
        not anew
        and final.exists()
        and damage(final) is None
        and _evaluated(load_json(final, STATE)) == _evaluated(json.loads(texts[STATE]))
    ):
        return final  # a step's state is a function of the run: what is there is what would be written
    writers = {name: partial(torch.save, value) for name, value in tensors.items()}
    with new_folder(final, replace=True) as folder:
        files: dict[str, Content] = {**writers, **{name: _as_bytes(text) for name, text in texts.items()}}
        write_digests(folder, {name: write_file(folder / name, content) for name, content in files.items()})
    return final


def _as_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _evaluated(state: dict[str, Any]) -> Any:
    """The step of the last evaluation that a training_state.json knows of. A run that was stopped in one is saved
    before it, and again when it has been made."""
    return state.get("progress", {}).get("evaluated_at")


def write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Write, last, what `damage` knows the files of a folder by."""
    write_file(folder / DIGESTS, json.dumps(digests, indent=1).encode())


class _Digesting:
    """A file that hashes what passes through; torch.save only needs `write` and `flush`."""

    def __init__(self, file: Any) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save would only report that something went wrong
            raise

    def flush(self) -> None:
        self.file.flush()


def write_file(path: Path, content: Content) -> str:
    """Write a file, flushed to the disk, and give its digest."""
    with open(path, "wb") as raw:
        file = _Digesting(raw)
        try:
            content(file) if callable(content) else file.write(content)
        except RuntimeError:
            if file.error is not None:
                raise file.error from None
            raise
        raw.flush()
        os.fsync(raw.fileno())
    return file.hash.hexdigest()


def damage(folder: Path, always: Sequence[str] = ALWAYS, *, may_link: bool = False) -> str | None:
    """What is wrong with the folder of a checkpoint, or None when every file matches its digest. Nothing is opened that
    is no file: reading a FIFO would wait forever, and some devices never end.

    `always`: files that digests must name; `may_link`: whether files may lie elsewhere.
    """
    try:
        if strange := _no_file(folder, may_link):
            return strange
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return f"{DIGESTS} is missing or unreadable"
    if not isinstance(digests, dict):
        return f"{DIGESTS} is no JSON object"
    for name in always:
        if name not in digests:
            return f"{DIGESTS} does not name {name}"
    for name, expected in digests.items():
        if Path(name).name != name:
            return f"{DIGESTS} names {name}, which is no file of the folder"
        try:
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return f"{name} does not match its digest"
        except (OSError, ValueError):  # the second: a NUL in the name
            return f"{name} is missing"
    return _unreadable(folder / STATE) if STATE in digests else None


def _no_file(folder: Path, may_link: bool) -> str:
    """The first entry that is neither a file of this folder nor a folder, "" for none. The folder itself may lie behind
    a link, as on scratch disks."""
    home = os.path.realpath(folder)
    for entry in sorted(folder.iterdir()):
        # Not by `resolve`, which raises RuntimeError for a link to itself.
        if not may_link and entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(home):
            return f"{entry.name} is a link that leaves the folder"
        try:
            mode = entry.stat().st_mode
        except OSError:
            return f"{entry.name} is a link that leads nowhere"
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return f"{entry.name} is no file"
    return ""


def _unreadable(path: Path) -> str | None:
    """What is wrong with a JSON file whose digest is right, as far as every version can say."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return f"{path.name} is no JSON"
    if not isinstance(content, dict):
        return f"{path.name} is no JSON object"
    if content.get("format", FORMAT) != FORMAT:
        return f"{path.name} has format {content['format']!r}, and this trainer reads {FORMAT}"
    return None


def newest_checkpoint(
    run_dir: Path, warn: Callable[[str], None], wrong_with: Callable[[Path], str | None] = damage
) -> Path | None:
    """The newest checkpoint of a run with which nothing is wrong; others are reported and passed over."""
    for checkpoint in reversed(checkpoints_in(run_dir)):
        problem = wrong_with(checkpoint)
        if problem is None:
            return checkpoint
        warn(f"{checkpoint} is damaged ({problem}); using the one before it")
    return None


def find_checkpoint(
    path: str | Path, warn: Callable[[str], None], wrong_with: Callable[[Path], str | None] = damage
) -> Path:
    """A checkpoint folder from what a person names: the folder itself, a run folder (its newest), or a link
    folder such as `best_model`."""
    path = expand_path(path)
    if not path.exists():
        raise ValueError(nothing_at(path))
    if (path / "training_state.json").exists() and (path / DIGESTS).exists() and not checkpoints_in(path):
        problem = wrong_with(path)
        if problem:
            raise ValueError(f"{path} is damaged: {problem}")
        return path
    found = newest_checkpoint(path, warn, wrong_with)
    if found is None:
        raise ValueError(f"{path} holds no complete checkpoint.{_how_to_start_over(path)}")
    return found


def _how_to_start_over(run_dir: Path) -> str:
    """The command for a run that ended before its first checkpoint, behind a space; "" for any other folder."""
    config = run_dir / "config.yaml"
    if checkpoints_in(run_dir) or not config.is_file():
        return ""
    command = command_line(config, word("output_dir", run_dir), "resume=auto")
    return f" Its run ended before the first one; to start it over: {command}"


def load_json(checkpoint: Path, name: str) -> Any:
    return json.loads((checkpoint / name).read_text(encoding="utf-8"))


def load_tensors(checkpoint: Path, name: str) -> Any:
    """Tensors and plain containers: nothing in a checkpoint is executed. NotAsWritten where the file holds
    others."""
    with as_written(checkpoint / name):
        return torch.load(checkpoint / name, map_location="cpu", weights_only=True)


def load_named_tensors(checkpoint: Path, name: str, *keys: str) -> dict[str, torch.Tensor]:
    """Tensors by name, below `keys` of what a file holds. NotAsWritten where it holds others."""
    found = load_tensors(checkpoint, name)
    with as_written(checkpoint / name):
        for key in keys:
            found = found[key]
        _require_named_tensors(found)
    return found


def _require_named_tensors(found: Any) -> None:
    """TypeError where it is not {name: tensor}, or a tensor is one without numbers."""
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise TypeError("no tensors by name")
    for name, tensor in found.items():
        if not isinstance(name, str) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise TypeError(f"{name} is no tensor of numbers")


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Around what takes a file for one that was written here, whose digest alone is known to be right: NotAsWritten
    names the file where it is another."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        UnpicklingError,
    ) as error:
        if isinstance(error, TrainingError) or of_the_machine(error):
            raise
        raise NotAsWritten(f"{path} is not as this trainer writes it ({sentence(error)})") from error


def prune(run_dir: Path, keep: int | None, newest: Path, is_sound: Callable[[Path], bool]) -> None:
    """Delete what lies before the checkpoint `newest`, which was just written, beyond `keep` with it. Damaged ones do
    not count, and go. Those of later steps are damaged, as else the run would have gone on there: they stay for whoever
    wants to look until it comes by. Link folders keep their files: hard links outlive this."""
    if keep is None:
        return
    found = checkpoints_in(run_dir)
    kept = 1
    for old in reversed(found[: found.index(newest)]):
        if kept < keep and is_sound(old):
            kept += 1
        else:
            discard(old)


def link_folder(checkpoint: Path, target: Path) -> None:
    """Make `target` a folder of hard links (copies where impossible) to a checkpoint's files."""
    ready = beside(target)
    ready.mkdir()
    for file in _files(checkpoint):
        _link(file, ready / file.name)
    replace_folder(target, ready)


def link_files(checkpoint: Path, run_dir: Path) -> None:
    """Put the newest checkpoint's files at the top of the run folder, each replaced atomically. What it no longer has
    goes: it would keep the room of an older one."""
    for file in _files(checkpoint):
        if file.name in (DIGESTS, DOCUMENTS):  # the run's own are those of its score
            continue
        temporary = beside(run_dir / file.name)
        _link(file, temporary)
        os.replace(temporary, run_dir / file.name)
        temporary.unlink(missing_ok=True)  # renaming one link over another of the same file does nothing
    for name in OPTIONAL:
        if not (checkpoint / name).exists():
            (run_dir / name).unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
