"""What tells apart the weights, the text and the code of a score: sha256, in hex."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapters.base import ModelAdapter
from data.cache import file_digest
from data.rows import HeldoutRows

if TYPE_CHECKING:
    from trainer.run.restore import Restored

__all__ = ["digests", "of_content"]

ROOT = Path(__file__).resolve().parents[3]
# Of the project: what a score depends on. Tests and benchmarks are none of it.
PACKAGES = ("adapters", "configs", "data", "kernels", "models", "trainer")
ALONE = ("naming.py",)


def digests(restored: Restored, rows: HeldoutRows) -> dict[str, str]:
    """`weights` and `model`, `text` and `tokenizer`, and `code <package>` of each package, and of each file outside of
    the project that a class of the model or its adapter is from."""
    return {
        "weights": of_weights(restored.adapter),
        "model": of_content({"type": restored.cfg.type, "model_cfg": _model_cfg(restored)}),
        "text": of_text(rows),
        "tokenizer": restored.tokenizer.digest,
        **of_code(restored.adapter),
    }


def _model_cfg(restored: Restored) -> dict[str, Any]:
    return restored.adapter.model_cfg.model_dump(mode="json")


def of_content(content: Any) -> str:
    """Of what JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def of_weights(adapter: ModelAdapter) -> str:
    """Of every parameter and buffer as it was scored with, bases from elsewhere included."""
    found = hashlib.sha256()
    for name, tensor in sorted(adapter.model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # what a module says of itself besides
            found.update(f"{name} {tensor!r}\n".encode())
            continue
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return found.hexdigest()


def of_text(rows: HeldoutRows) -> str:
    """Of the documents that are scored, in their order, and of how they are cut into rows."""
    found = hashlib.sha256(f"{rows.scores} {rows.seq_len} {rows.n_rows}\n".encode())
    for index in rows.documents.tolist():
        text = rows.store.text(index)
        found.update(f"{len(text)}\n".encode())
        found.update(text)
    return found.hexdigest()


def of_code(adapter: ModelAdapter) -> dict[str, str]:
    found = {f"code {name}": _of_files(ROOT / name, sorted((ROOT / name).rglob("*.py"))) for name in PACKAGES}
    found["code naming"] = file_digest(ROOT / ALONE[0])
    for kind in (*type(adapter).__mro__, *type(adapter.model).__mro__):
        file = _file_of(kind)
        if file is not None and _is_outside(kind, file):
            found[f"code {kind.__module__}"] = file_digest(file)
    return found


def _of_files(folder: Path, files: list[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(folder).as_posix()} {file_digest(file)}\n".encode())
    return found.hexdigest()


def _file_of(kind: type) -> Path | None:
    try:
        return Path(inspect.getfile(kind)).resolve()
    except (TypeError, OSError):  # of C, or made while running
        return None


def _is_outside(kind: type, file: Path) -> bool:
    """Whether it is neither the project's nor an installed package's."""
    package = kind.__module__.partition(".")[0]
    installed = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    if any(folder in file.parents for folder in installed):
        return False
    return package not in PACKAGES or ROOT / package not in file.parents
