"""What two folders of the same run have to agree in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

__all__ = ["contents", "differences", "room"]

# What may differ: the place, times and what follows from them, memory, the words of the command line, the state of the
# working tree, and the kernels, which are those of the last life.
_TIMED = re.compile(
    r"output_dir|git_|^kernels$|seconds|tokens_per_second|memory|argv|started|^began$|^ended$|date|load_average|mfu"
    r"|threads|torch"
)
_PLACE = re.compile(rb"(?m)^(output_dir|# Composed from).*$")
# These say when and where; of them it counts that they are there.
_PRESENT = ("report.html", "digests.json")
_NOT_COMPARED = re.compile(r"\.lock|.*\.dropped\.(jsonl|txt)|process-\d+\.log")


def contents(path: Path) -> dict[str, Any]:
    """Name -> what a file of the folder says, without what may differ."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    named = {str(file.relative_to(path)): file for file in files}
    return {name: _read(file) for name, file in named.items() if not _NOT_COMPARED.fullmatch(file.name)}


def _read(file: Path) -> Any:
    """What it says, or why that cannot be read."""
    try:
        return _content(file)
    except Exception as error:  # torch.load raises anything
        return f"unreadable: {error}"


def _content(file: Path) -> Any:
    if file.name in _PRESENT:
        return True
    if file.suffix == ".pt":
        return _plain(torch.load(file, weights_only=True))
    if file.suffix == ".jsonl":
        return [_plain(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    if file.suffix == ".json":
        return _plain(json.loads(file.read_bytes()))
    return _PLACE.sub(b"", file.read_bytes())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not _TIMED.search(str(k))}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def differences(path: Path, expected: dict[str, Any]) -> list[str]:
    """Names of files that say something else, or are there in one of the two only."""
    found = contents(path)
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def room(path: Path) -> int:
    """Bytes on the disk, each file once however many names it has."""
    return sum({(s := file.stat()).st_ino: s.st_size for file in path.rglob("*") if file.is_file()}.values())
