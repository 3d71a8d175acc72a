"""model.safetensors: named tensors in a file that is read and never executed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.saved import WEIGHTS

__all__ = ["WEIGHTS", "open_tensors", "read_tensors", "safetensors_library", "write_tensors"]

_POINTER = b"version https://git-lfs"  # begins a file that was cloned without its content


def safetensors_library() -> Any:
    """The library, imported on use. ValueError says how to have it."""
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ValueError('safetensors is not installed. pip install -e ".[hf]"') from None
    return safetensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write such a file, flushed to the disk, and give its digest. Tensors are contiguous and share no memory.

    Raises OSError or RuntimeError.
    """
    library = safetensors_library()
    path.touch()
    mode = path.stat().st_mode  # the library would have it readable by its owner alone
    try:
        library.torch.save_file(dict(tensors), path, metadata={"format": "pt"})
    except library.SafetensorError as error:
        raise RuntimeError(str(error)) from None
    path.chmod(mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU. ValueError if the file is cut short or damaged."""
    opened = open_tensors(path)
    return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def open_tensors(path: Path) -> Any:
    """The file as the library opens it: `keys()`, and `get_tensor(name)`, which stays on disk until it is copied.
    ValueError if it is cut short or damaged."""
    library = safetensors_library()
    try:
        return library.safe_open(path, framework="pt")
    except (library.SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            pointer = file.read(len(_POINTER)) == _POINTER
        why = "it is a pointer of Git LFS; git lfs pull fetches what it stands for" if pointer else error
        raise ValueError(f"{path} is cut short or damaged: {why}") from None
