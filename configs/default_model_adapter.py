"""`DefaultModelConfig` and `DefaultModelAdapter`: what other architectures and adapters inherit from.

The adapter is fetched on first use: importing `configs` must not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from configs.schema import DefaultModelConfig

__all__ = ["DefaultModelAdapter", "DefaultModelConfig"]  # noqa: F822 (the first by __getattr__)


def __getattr__(name: str) -> Any:
    if name == "DefaultModelAdapter":
        return importlib.import_module("adapters.default").DefaultModelAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
