"""Files and folders that are replaced in one go or left as they were.

What is not whole yet has a name of its own: neither the clock nor the number of the process is in it, which in a
container is the same every time. What a killed process left under such names is removed by whoever holds the run
folder's lock next.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.concealed import conceal
from naming import expand_path
from trainer.errors import TrainingError

__all__ = [
    "append",
    "beside",
    "checkpoints_in",
    "could_not_write",
    "discard",
    "new_folder",
    "output_file",
    "replace_folder",
    "settle_leftovers",
    "sync_folder",
    "write_atomically",
]

UNFINISHED, RETIRED = "tmp", "old"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_KINDS = rf"(?P<kind>{UNFINISHED}|{RETIRED})"
# Ours, and those of versions that named them by process number. Nothing else in a folder is touched.
_LEFTOVERS = (
    re.compile(rf"\.(?P<name>.+)\.[0-9a-f]{{16}}\.{_KINDS}"),
    re.compile(
        rf"\.(?P<name>checkpoint-\d+|best_model|final_model|[a-z_]+\.(?:json|jsonl|yaml|html|txt|pt))\.\d+\.{_KINDS}"
    ),
)


def beside(path: Path, kind: str = UNFINISHED) -> Path:
    """A hidden name in the same folder that nobody else uses. A name may have 255 bytes: long ones are cut."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.{kind}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`, text as UTF-8, or leave it as it was. Raises TrainingError if that cannot be
    done."""
    temporary = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(_as_bytes(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise could_not_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _as_bytes(content: str | bytes) -> bytes:
    """Bytes of the name of a file or folder that are not UTF-8 are written as escapes, and no secret is."""
    return conceal(content).encode("utf-8", "backslashreplace") if isinstance(content, str) else content


def output_file(given: str, option: str = "output") -> Path:
    """The file that an option names. ValueError where it cannot be written: now, not when the work is done."""
    path = expand_path(given)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: cannot write {path}. Give a file in an existing folder")
    return path


def append(path: Path, content: str | bytes) -> None:
    """Put `content`, text as UTF-8, at the end of a file. Raises TrainingError if that cannot be done."""
    try:
        with open(path, "ab") as file:
            file.write(_as_bytes(content))
    except OSError as error:
        raise could_not_write(path, error) from error


@contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to put flushed files into, called `target` once the body has ended well; else it is removed. In the
    place of `target` there may be an empty folder, or any that is to be replaced. Raises TrainingError if it cannot be
    written."""
    ready = beside(target)
    try:
        ready.mkdir(parents=True)
        yield ready
        sync_folder(ready)
        if replace:
            replace_folder(target, ready)
        else:
            os.rename(ready, target)
        sync_folder(target.parent)
    except (OSError, RuntimeError) as error:
        raise could_not_write(target, error) from error
    finally:
        shutil.rmtree(ready, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk, where the system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(target: Path, ready: Path) -> None:
    """Put the folder `ready` in the place of `target`. Between the two renames there is neither: `settle_leftovers`
    brings the old one back."""
    if not target.exists():
        os.rename(ready, target)
        return
    retired = beside(target, RETIRED)
    os.rename(target, retired)
    try:
        os.rename(ready, target)
    except OSError:
        os.rename(retired, target)
        raise
    shutil.rmtree(retired)


def discard(folder: Path) -> None:
    """Delete a folder so that no half of it is ever seen under its name."""
    unnamed = beside(folder)
    os.rename(folder, unnamed)
    shutil.rmtree(unnamed)


def settle_leftovers(folder: Path) -> None:
    """Finish what a killed process was doing in this folder: what it retired and had not replaced yet comes back, the
    rest goes. Only for who holds the folder's lock."""
    for path in folder.iterdir():
        match = next(filter(None, (pattern.fullmatch(path.name) for pattern in _LEFTOVERS)), None)
        if match is None:
            continue
        original = folder / match["name"]
        if match["kind"] == RETIRED and not original.exists():
            os.rename(path, original)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def checkpoints_in(run_dir: Path) -> list[Path]:
    """The `checkpoint-<step>` folders of a run, oldest first, by step number."""
    found = [
        (int(m[1]), p)
        for p in run_dir.glob("checkpoint-*")
        if (m := _CHECKPOINT.fullmatch(p.name)) and p.is_dir()
    ]
    return [path for _, path in sorted(found)]


def could_not_write(path: Path, error: Exception, run: Path | None = None) -> TrainingError:
    """The message for a failed write: why, what of the run is safe, what to do. `run`: its folder, that of `path` if
    none is given; it need not be one."""
    run = run or path.parent
    folder = next(p for p in path.absolute().parents if p.exists())
    free, number = shutil.disk_usage(folder).free, getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or (number is None and free < 1 << 20):
        reason, remedy = f"the disk is full ({free / 1e6:.1f} MB free)", "Free some space"
    else:
        said = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        reason, remedy = said or type(error).__name__, "Mend that"
    if kept := checkpoints_in(run):
        remedy = f"The last complete checkpoint is {kept[-1]}. {remedy} and resume"
    elif (run / "manifest.json").exists():
        remedy = f"No checkpoint had been saved before. {remedy} and start again"
    else:
        remedy += " and try again"
    return TrainingError(f"could not write {path}: {reason}. {remedy}")
