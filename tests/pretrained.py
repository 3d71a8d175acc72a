"""Tiny bases as `save_pretrained` of transformers leaves them, from its config objects, with numbers of our own."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tests.data.foreign import byte_level, saved

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
GATED = {"intermediate_size": 96, "num_key_value_heads": 2}
VOCABULARY = 300  # at least the tokens of `byte_level`


def base_config(kind, vocabulary=VOCABULARY, **entries):
    import transformers

    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if kind == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "summary_first_dropout": 0.0}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2Config(**{"vocab_size": vocabulary, **sizes, **drops, **tokens, **entries})
    cls = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}[kind]
    return cls(**{"vocab_size": vocabulary, **SIZES, **GATED, **tokens, **entries})


def save_base(path, kind="gpt2", vocabulary=VOCABULARY, seed=0, std=0.05, **entries):
    """A folder with weights N(0, std^2) of `seed`, whatever the version of any library."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(base_config(kind, vocabulary, **entries))
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            drawn = std * rng.standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(drawn + (parameter.ndim == 1 and "bias" not in name)))
    saved(Path(path), byte_level(), tokenizer_config={"eos_token": "<|endoftext|>"})
    # By hand, as `save_pretrained` writes nothing in the second process of a group.
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    (Path(path) / "config.json").write_text(json.dumps(config))
    held = {name: p.detach().clone() for name, p in model.named_parameters()}  # of tied ones the first
    save_file(held, Path(path) / "model.safetensors", metadata={"format": "pt"})
    return Path(path)


@functools.cache
def _kept():
    return tempfile.TemporaryDirectory(prefix="bases-")


@functools.cache
def base_of(kind="gpt2", vocabulary=VOCABULARY, seed=0):
    """One that lasts as long as this process."""
    return save_base(Path(_kept().name) / f"{kind}-{vocabulary}-{seed}", kind, vocabulary, seed)
