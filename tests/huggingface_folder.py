"""Folders as `save_pretrained` of transformers leaves them, made without it: in milliseconds, and to be broken."""

import json

import torch
from safetensors.torch import save_file

from models.gpt2 import GPT2, GPT2Config
from models.huggingface import to_config
from models.vanilla import Vanilla, VanillaConfig
from tests.data.foreign import byte_level, saved

CLASSES = {"gpt2": (GPT2, GPT2Config), "vanilla": (Vanilla, VanillaConfig)}
TINY = {"n_ctx": 32, "d_model": 16, "n_layers": 2, "n_heads": 4}
VOCABULARY = 300


def weights(type_="gpt2", seed=0, **fields):
    """The state dict of a random model under transformers' names."""
    model_class, config_class = CLASSES[type_]
    model = model_class(config_class(vocab_size=VOCABULARY, **{**TINY, **fields}))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.to_hf_state_dict()


def huggingface_folder(path, type_="gpt2", seed=0, entries=None, shards=1, dtype=torch.float32, **fields):
    """A folder with config.json, weights in so many files, and a byte-level tokenizer; `fields` are ours, `entries` of
    config.json are theirs."""
    cfg = CLASSES[type_][1](vocab_size=VOCABULARY, **{**TINY, **fields})
    tensors = {name: t.to(dtype).contiguous() for name, t in weights(type_, seed, **fields).items()}
    if cfg.tie_embeddings:
        del tensors["lm_head.weight"]
    saved(path, byte_level(), tokenizer_config={"eos_token": "<|endoftext|>"})
    (path / "config.json").write_text(json.dumps({**to_config(type_, cfg), **(entries or {})}))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    place = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(place.values()):
        save_file(
            {n: t for n, t in tensors.items() if place[n] == file}, path / file, metadata={"format": "pt"}
        )
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return path


def edit_json(path, **entries):
    """Change entries of a JSON file; None takes one out."""
    content = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
