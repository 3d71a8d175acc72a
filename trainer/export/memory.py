"""The memory of a model alone: tensors by our names, a bank in the bits that it is kept in. Where all else is a base
that stays as it is, `trainer/run/exported.py` reads the folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import trust
from configs.saved import MEMORY, MEMORY_WEIGHTS
from configs.schema import redacted
from models.memory.bank import bits_of
from models.memory.quant import packed_state
from naming import command_line
from trainer.export.form import Contents, Form
from trainer.export.rounding import Rounding
from trainer.run.facts import architecture

if TYPE_CHECKING:
    from configs.schema import ModelConfig, RunConfig
    from trainer.run.restore import Restored

__all__ = ["MemoryAlone"]


class MemoryAlone(Form):
    file, digests = MEMORY_WEIGHTS, True

    def check(self, cfg: RunConfig, model_cfg: ModelConfig) -> None:
        if "num_memory_tokens" not in type(model_cfg).model_fields:
            raise ValueError(f"to: memory is for models with a memory, and type={cfg.type} has none")

    def contents(self, restored: Restored, rounding: Rounding) -> Contents:
        adapter, source = restored.adapter, restored.source
        own, bits = adapter.beside(), bits_of(adapter.model)
        state = {n: tensor.contiguous() for n, tensor in adapter.trained_state().items() if n in own}
        if not state:
            raise ValueError(
                "to: memory is for models with a memory, and this one was trained without (vanilla_mode)"
            )
        state = {name: t if name in bits else rounding(name, t) for name, t in state.items()}
        adapters = source is not None and source.adapts  # they were added to a base that is not written
        record = {
            "whole": bool(adapter.external())
            and not adapters
            and state.keys() == adapter.trained_state().keys(),
            "weights": restored.weights,
            "rounded": rounding.changed,
            "shared": {},
            "data": source.data if source else None,
            "training_config": redacted(restored.cfg),
        }
        return Contents(
            packed_state(state, bits),
            {
                "config.json": architecture(restored.cfg, adapter, restored.micro_rows),
                "tokenizer.json": restored.tokenizer.to_json(),
                MEMORY: record,
            },
        )

    def opened_by(self, folder: Path, contents: Contents) -> list[str]:
        record: Any = contents.files[MEMORY]
        if not record["whole"]:
            return [f"from safetensors.torch import load_file; load_file({str(folder / self.file)!r})"]
        said = record["training_config"]
        return [
            command_line(
                "generate", "--checkpoint", folder, *trust.option(said["type"], said["model_adapter"])
            ),
            f"python mytrainer.py --hydra_model_cfg=<the run's file> init_from_checkpoint={folder}",
        ]
