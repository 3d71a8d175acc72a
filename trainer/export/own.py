"""A folder that this trainer opens: any architecture, under our names (`trainer/run/exported.py` reads it)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs import trust
from configs.saved import EXPORT
from configs.schema import redacted
from models.memory.bank import bits_of
from models.memory.quant import packed_state
from naming import command_line
from trainer.export.form import Contents, Form
from trainer.export.rounding import Rounding
from trainer.run.facts import architecture

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import ModelConfig, RunConfig
    from trainer.run.restore import Restored

__all__ = ["Own"]


class Own(Form):
    digests = True

    def adds_up(self, adapter: ModelAdapter) -> bool:
        """Not to a base that is not written."""
        return not adapter.external()

    def check(self, cfg: RunConfig, model_cfg: ModelConfig) -> None:
        pass  # every architecture has this form

    def contents(self, restored: Restored, rounding: Rounding) -> Contents:
        adapter, source = restored.adapter, restored.source
        tensors, shared = _unshared(adapter.trained_state())
        parameters = {name for name, _ in adapter.model.named_parameters(remove_duplicate=False)}
        bits = bits_of(adapter.model)
        tensors = {
            name: rounding(name, t) if name in parameters and name not in bits else t
            for name, t in tensors.items()
        }
        tensors = packed_state(tensors, bits)
        record = {
            "weights": restored.weights,
            "rounded": rounding.changed,
            "shared": shared,
            "data": source.data if source else None,
            "training_config": redacted(restored.cfg),
        }
        return Contents(
            tensors,
            {
                "config.json": architecture(restored.cfg, adapter, restored.micro_rows),
                "tokenizer.json": restored.tokenizer.to_json(),
                EXPORT: record,
            },
        )

    def opened_by(self, folder: Path, contents: Contents) -> list[str]:
        record: Any = contents.files[EXPORT]
        said = record["training_config"]
        needed = trust.option(said["type"], said["model_adapter"])
        trusting = f", trust={needed[1]!r}" if needed else ""
        return [
            command_line("generate", "--checkpoint", folder, *needed),
            f"from mytrainer import load; model = load({str(folder)!r}{trusting})",
        ]


def _unshared(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors of which no two share memory, as such a file needs; and of names that stand for the very same
    tensor, as tied weights do, the name that it is kept under."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    kept: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in kept:
            shared[name] = kept[place]
            continue
        storage = tensor.untyped_storage().data_ptr()
        overlaps = storage in storages
        kept[place] = name
        storages.add(storage)
        tensors[name] = (
            tensor.clone(memory_format=torch.contiguous_format) if overlaps else tensor.contiguous()
        )
    return tensors, shared
