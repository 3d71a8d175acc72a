"""model.safetensors: named tensors in a file that is read and never executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["WEIGHTS", "read_tensors", "safetensors_library", "tensor_bytes"]

WEIGHTS = "model.safetensors"


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
    library = safetensors_library()
    try:
        return library.torch.load_file(path)
    except library.SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from None
