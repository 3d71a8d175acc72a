"""Tensors in safetensors files, read one at a time: a large model is not in memory twice because it is being loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from naming import shorten
from trainer.run.tensor_files import open_tensors

__all__ = ["Shards"]


class Shards(Mapping[str, Tensor]):
    """The tensors of some files by name, on the CPU. They stay on disk until they are copied."""

    def __init__(self, files: list[Path], index: Mapping[str, str] | None = None) -> None:
        """`index`: tensor -> name of its file, where something says it. ValueError if a file is cut short or damaged,
        or holds others than those that the index says."""
        self._opened = {file.name: open_tensors(file) for file in files}
        there = {name: file for file, tensors in self._opened.items() for name in tensors.keys()}  # noqa: SIM118
        if index is not None:
            _require_indexed(files[0].parent, index, there)
        self._file = there

    def __getitem__(self, name: str) -> Tensor:
        return self._opened[self._file[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


def _require_indexed(folder: Path, index: Mapping[str, str], there: Mapping[str, str]) -> None:
    problems = [f"{name} is not in {file}" for name, file in index.items() if there.get(name) != file]
    problems += [
        f"{file} holds {name}, which the index lacks" for name, file in there.items() if name not in index
    ]
    if problems:
        raise ValueError(
            f"{folder}: the files of the weights are not as their index says: {shorten(problems)}"
        )
