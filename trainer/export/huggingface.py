"""A folder that Hugging Face transformers opens: architectures of `models.huggingface.ROWS`, under its names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from data.huggingface.written import huggingface_files
from models.huggingface import to_config
from models.layers.huggingface import HEAD, HuggingFaceDecoder
from models.memory.adapter import MemoryAdapter
from trainer.export.form import Contents, Form, require_nothing_added
from trainer.export.rounding import Rounding

if TYPE_CHECKING:
    from configs.schema import ModelConfig, RunConfig
    from data.tokenizers import Tokenizer
    from trainer.run.restore import Restored

__all__ = ["HuggingFace"]

_ANY_WAY = "--to safetensors takes every architecture"


class HuggingFace(Form):
    def check(self, cfg: RunConfig, model_cfg: ModelConfig) -> None:
        if model_cfg.elsewhere:  # transformers has what it stands on
            require_nothing_added(model_cfg)
            return
        try:
            to_config(cfg.type, model_cfg)
        except ValueError as error:
            raise ValueError(f"to: {error}. {_ANY_WAY}") from None

    def contents(self, restored: Restored, rounding: Rounding) -> Contents:
        cfg, model_cfg, tokenizer = restored.cfg, restored.adapter.model_cfg, restored.tokenizer
        model = restored.adapter.model
        if isinstance(model, MemoryAdapter):
            return _of_base(model, tokenizer, rounding)
        if not isinstance(model, HuggingFaceDecoder):  # an adapter may bring its own
            raise ValueError(
                f"to: a {type(model).__name__} does not write the weights of transformers. {_ANY_WAY}"
            )
        weights = model.to_hf_state_dict()
        if model_cfg.tie_embeddings:  # written, rounded and counted once
            del weights[HEAD]
        tensors = {
            name: weight if name.endswith(model.hf_exact) else rounding(name, weight)
            for name, weight in weights.items()
        }
        config = to_config(cfg.type, model_cfg, **_ids(tokenizer), dtype=_dtype(tensors))
        return _contents(tensors, config, tokenizer, getattr(model_cfg, "n_ctx", None))

    def opened_by(self, folder: Path, contents: Contents) -> list[str]:
        names = ["AutoModelForCausalLM", *(["AutoTokenizer"] if "tokenizer.json" in contents.files else [])]
        return [
            f"from transformers import {', '.join(names)}",
            *(f"{name}.from_pretrained({str(folder)!r})" for name in names),
        ]


def _of_base(model: MemoryAdapter, tokenizer: Tokenizer, rounding: Rounding) -> Contents:
    """The base, with what adapters said in its weights."""
    names, state = model.hf_names(), model.state_dict()
    tensors = {there: rounding(here, state[here]) for here, there in names.items()}
    config = {**model.hf_config(), **_ids(tokenizer), "dtype": _dtype(tensors)}
    return _contents(tensors, config, tokenizer, model.max_context)


def _contents(
    tensors: dict[str, Tensor], config: dict[str, Any], tokenizer: Tokenizer, context: int | None
) -> Contents:
    ends = _ends(tokenizer)
    files = huggingface_files(tokenizer, context)
    generation = {**_ids(tokenizer), "eos_token_id": ends if len(ends) > 1 else ends[0]}
    return Contents(
        tensors,
        {"config.json": config, "generation_config.json": generation, **(files or {})},
        notes=(_of_tokenizer(tokenizer, files is not None),),
    )


def _ends(tokenizer: Tokenizer) -> list[int]:
    """A text ends where one would begin, too; the token that is an end alone is named first."""
    return [*sorted(tokenizer.ends - {tokenizer.eot}), tokenizer.eot]


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {"bos_token_id": tokenizer.eot, "eos_token_id": _ends(tokenizer)[0]}


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    return str(next(iter(tensors.values())).dtype).removeprefix("torch.")


def _of_tokenizer(tokenizer: Tokenizer, written: bool) -> str:
    if not written:
        return f"tokenizer {tokenizer.name} has no form that transformers opens, and is left out"
    first = next(token for token, index in tokenizer.special_tokens.items() if index == tokenizer.eot)
    split = tokenizer.huggingface_config.get("split_special_tokens")
    there = "ordinary characters there too" if split else "that token there, and ordinary characters here"
    return (
        f"here texts begin with {first}, id {tokenizer.eot}: put that id first where transformers scores or goes on. "
        f"What is spelled so within a text is {there}"
    )
