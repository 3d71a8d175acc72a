"""model.safetensors: named tensors in a file that is read and never executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.huggingface.folder import WEIGHTS

__all__ = ["WEIGHTS", "open_tensors", "read_tensors", "safetensors_library", "tensor_bytes"]

_POINTER = b"version https://git-lfs"  # begins a file that was cloned without its content


def safetensors_library() -> Any:
    """The library, imported on use. ValueError says how to have it."""
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ValueError('safetensors is not installed. pip install -e ".[hf]"') from None
    return safetensors


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of such a file. Tensors are contiguous and share no memory."""
    return safetensors_library().torch.save(dict(tensors), metadata={"format": "pt"})


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
