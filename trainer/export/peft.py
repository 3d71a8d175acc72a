"""A folder that PEFT opens: adapters of an architecture that transformers has, beside weights in its form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.saved import ADAPTER_CONFIG, read_json
from models.huggingface import to_config
from models.layers.huggingface import HuggingFaceDecoder
from models.memory.adapter import MemoryAdapter
from trainer.export.form import Contents, Form, require_nothing_added
from trainer.export.rounding import Rounding
from trainer.run.peft import ADAPTERS, PREFIX, is_peft

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import ModelConfig, RunConfig
    from trainer.run.restore import Restored

__all__ = ["Peft"]

_ANY_WAY = "--to safetensors takes every architecture, and what its adapters add"


class Peft(Form):
    file = ADAPTERS

    def adds_up(self, adapter: ModelAdapter) -> bool:
        return False

    def check(self, cfg: RunConfig, model_cfg: ModelConfig) -> None:
        if not cfg.use_lora:
            raise ValueError("to: peft is for adapters, and this run has none. Train some with use_lora=true")
        if model_cfg.elsewhere:  # transformers has what it stands on
            require_nothing_added(model_cfg)
            return
        try:
            to_config(cfg.type, model_cfg)
        except ValueError as error:
            raise ValueError(f"to: {error}. {_ANY_WAY}") from None

    def contents(self, restored: Restored, rounding: Rounding) -> Contents:
        model, low_rank = restored.adapter.model, restored.adapter.low_rank
        assert low_rank is not None
        if not isinstance(model, HuggingFaceDecoder | MemoryAdapter):  # an adapter may bring its own
            raise ValueError(f"to: a {type(model).__name__} has no names in transformers. {_ANY_WAY}")
        if stacks := [target.path for target in restored.adapter.adapted if target.parameter != "weight"]:
            raise ValueError(f"to: PEFT has no form for a stack of experts ({stacks[0]}). {_ANY_WAY}")
        state = model.state_dict()
        adapted = [target.module for target in restored.adapter.adapted]
        if isinstance(model, MemoryAdapter):
            names = model.hf_names()
            theirs = {name: names[f"{name}.weight"].removesuffix(".weight") for name in adapted}
        else:
            theirs = {name: name if name == "lm_head" else model.hf_prefix + name for name in adapted}
        tensors = {
            f"{PREFIX}{there}.{name}.weight": rounding(f"{here}.{name}", state[f"{here}.{name}"])
            for here, there in theirs.items()
            for name in ("lora_A", "lora_B")
        }
        named, revision = restored.cfg.init_from_checkpoint, None
        if isinstance(model, MemoryAdapter) and not named:
            named, revision = model.cfg.base_model_name, model.cfg.base_model_revision
        elif named and not _is_of_transformers(Path(named)):
            named = None
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": named,
            "revision": revision,
            "r": low_rank.rank,
            "lora_alpha": low_rank.alpha,
            "lora_dropout": low_rank.dropout,
            "target_modules": list(theirs.values()),
            "bias": "none",
            "fan_in_fan_out": model.hf_transposed,
            "inference_mode": True,
        }
        return Contents(tensors, {ADAPTER_CONFIG: config})

    def opened_by(self, folder: Path, contents: Contents) -> list[str]:
        entries: Any = contents.files[ADAPTER_CONFIG]
        named = entries["base_model_name_or_path"]
        base = repr(named) if named else "BASE"
        remark = "" if named else "  # of what the run began from (init_from_checkpoint): export --to hf"
        return [
            "from peft import PeftModel; from transformers import AutoModelForCausalLM",
            f"base = AutoModelForCausalLM.from_pretrained({base}){remark}",
            f"model = PeftModel.from_pretrained(base, {str(folder)!r})",
        ]


def _is_of_transformers(folder: Path) -> bool:
    return (
        not is_peft(folder)
        and (folder / "config.json").is_file()
        and "model_type" in read_json(folder / "config.json")
    )
