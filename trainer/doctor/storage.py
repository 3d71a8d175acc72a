"""Where things are kept: caches with their sizes, and disks with what is left of them."""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from trainer.doctor.lines import Line, note, ok, problem, size, tried

__all__ = ["check"]

LITTLE = 2e9  # bytes: a few checkpoints of a small model


def check() -> Iterator[Line]:
    yield from tried("cache", _ours)
    yield from tried("cache of torch.compile", _inductor)
    yield from tried("cache of triton", _triton)
    yield from tried("disk", _disks)


def _ours() -> Line:
    from data.cache import cache_root

    return _cache("cache", cache_root(), "MYTRAINER_CACHE")


def _inductor() -> Line:
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    usual = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    return _cache("cache of torch.compile", Path(given) if given else usual, "TORCHINDUCTOR_CACHE_DIR")


def _triton() -> Line:
    given = os.environ.get("TRITON_CACHE_DIR")
    usual = Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"
    return _cache("cache of triton", Path(given) if given else usual, "TRITON_CACHE_DIR")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder around it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _cache(about: str, path: Path, variable: str) -> Line:
    there, writable = path.is_dir(), _existing(path)
    try:
        with tempfile.TemporaryFile(dir=writable):
            pass
    except OSError as error:
        return problem(
            about,
            f"{path} cannot be written to ({writable}: {error.strerror}): what is kept there is made anew every time",
            f"set {variable} to a folder that can be written to",
        )
    if not there:
        return ok(about, f"{path}, which is not there yet")
    parts = {entry.name: _size_of(Path(entry.path)) for entry in os.scandir(path)}
    largest = [name for name in sorted(parts, key=lambda name: -parts[name]) if (path / name).is_dir()][:4]
    of = (
        f" ({', '.join(f'{name} {size(parts[name])}' for name in largest)})"
        if about == "cache" and largest
        else ""
    )
    return ok(about, f"{path}: {size(sum(parts.values()))}{of}; it may be deleted")


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all below a folder."""
    files = [path]
    if path.is_dir() and not path.is_symlink():
        files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    total = 0
    for file in files:
        with suppress(OSError):  # gone meanwhile
            total += file.lstat().st_size
    return total


def _disks() -> Iterator[Line]:
    """Each disk once."""
    from data.cache import cache_root

    places = {"here": Path.cwd(), "cache": cache_root(), "temporary files": Path(tempfile.gettempdir())}
    seen = set()
    for name, path in places.items():
        if (device := _existing(path).stat().st_dev) not in seen:
            seen.add(device)
            yield _disk(name, path)


def _disk(name: str, path: Path) -> Line:
    free = shutil.disk_usage(_existing(path)).free
    text = f"{size(free)} free at {_existing(path)}"
    if free < LITTLE / 10:
        return problem(
            f"disk, {name}", text, "make room: a run that cannot write ends, with what it had saved"
        )
    if free < LITTLE:
        return note(f"disk, {name}", text, "make room before a long run, or choose another output_dir")
    return ok(f"disk, {name}", text)
