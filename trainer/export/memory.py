"""The memory of a model alone: tensors by our names, a bank in the bits that it is kept in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.memory.bank import bits_of
from models.memory.quant import packed_state
from trainer.export.form import Contents, Form
from trainer.export.rounding import Rounding
from trainer.run.facts import architecture

if TYPE_CHECKING:
    from configs.schema import ModelConfig, RunConfig
    from trainer.run.restore import Restored

__all__ = ["MemoryAlone"]


class MemoryAlone(Form):
    file, whole = "memory.safetensors", False

    def check(self, cfg: RunConfig, model_cfg: ModelConfig) -> None:
        if "num_memory_tokens" not in type(model_cfg).model_fields:
            raise ValueError(f"to: memory is for models with a memory, and type={cfg.type} has none")

    def contents(self, restored: Restored, rounding: Rounding) -> Contents:
        adapter = restored.adapter
        own, bits = adapter.beside(), bits_of(adapter.model)
        state = {n: tensor.contiguous() for n, tensor in adapter.trained_state().items() if n in own}
        if not state:
            raise ValueError(
                "to: memory is for models with a memory, and this one was trained without (vanilla_mode)"
            )
        state = {name: t if name in bits else rounding(name, t) for name, t in state.items()}
        record = architecture(restored.cfg, adapter, restored.micro_rows)
        return Contents(packed_state(state, bits), {"memory.json": record})

    def opened_by(self, folder: Path, contents: Contents) -> list[str]:
        return [f"from safetensors.torch import load_file; load_file({str(folder / self.file)!r})"]
