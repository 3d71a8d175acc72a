"""A folder that Hugging Face transformers opens: architectures of `models.huggingface.ROWS`, under its names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data.huggingface.written import huggingface_files
from models.huggingface import to_config
from models.layers.huggingface import HEAD, HuggingFaceDecoder
from trainer.export.form import Contents, Form
from trainer.export.rounding import Rounding

if TYPE_CHECKING:
    from configs.schema import ModelConfig, RunConfig
    from data.tokenizers import Tokenizer
    from trainer.run.restore import Restored

__all__ = ["HuggingFace"]

_ANY_WAY = "--to safetensors takes every architecture"


class HuggingFace(Form):
    def check(self, cfg: RunConfig, model_cfg: ModelConfig) -> None:
        try:
            to_config(cfg.type, model_cfg)
        except ValueError as error:
            raise ValueError(f"to: {error}. {_ANY_WAY}") from None

    def contents(self, restored: Restored, rounding: Rounding) -> Contents:
        cfg, model_cfg, tokenizer = restored.cfg, restored.adapter.model_cfg, restored.tokenizer
        model = restored.adapter.model
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
        # A text ends where one would begin, too; the token that is an end alone is named first.
        ends = [*sorted(tokenizer.ends - {tokenizer.eot}), tokenizer.eot]
        ids = {"bos_token_id": tokenizer.eot, "eos_token_id": ends[0]}
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        config = to_config(cfg.type, model_cfg, **ids, dtype=dtype)
        files = huggingface_files(tokenizer, getattr(model_cfg, "n_ctx", None))
        return Contents(
            tensors,
            {
                "config.json": config,
                "generation_config.json": {**ids, "eos_token_id": ends if len(ends) > 1 else ends[0]},
                **(files or {}),
            },
            notes=(_of_tokenizer(tokenizer, files is not None),),
        )

    def opened_by(self, folder: Path, contents: Contents) -> list[str]:
        names = ["AutoModelForCausalLM", *(["AutoTokenizer"] if "tokenizer.json" in contents.files else [])]
        return [
            f"from transformers import {', '.join(names)}",
            *(f"{name}.from_pretrained({str(folder)!r})" for name in names),
        ]


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
