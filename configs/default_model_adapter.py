"""`DefaultModelConfig` and `DefaultModelAdapter`, the base classes that other architectures and adapters inherit from.

The adapter is fetched on first use: importing `configs` must not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from configs.schema import DefaultModelConfig

__all__ = ["DefaultModelAdapter", "DefaultModelConfig"]


def __getattr__(name: str) -> Any:
    if name == "DefaultModelAdapter":
        return importlib.import_module("adapters.default").DefaultModelAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
