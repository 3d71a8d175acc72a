"""Checkpoints whose content is other than was saved, and whose digests say that it is not."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from trainer.run.checkpoint import DIGESTS, load_json, write_digests, write_file

__all__ = ["forge", "tensor_file"]


def forge(checkpoint: Path, name: str, content: bytes) -> None:
    """Put `content` in the place of a file; no file that shares its place on the disk changes."""
    digests = load_json(checkpoint, DIGESTS)
    for changed in (name, DIGESTS):
        (checkpoint / changed).unlink()
    write_digests(checkpoint, digests | {name: write_file(checkpoint / name, content)})


def tensor_file(value: Any) -> bytes:
    """What torch.save makes of it."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()
