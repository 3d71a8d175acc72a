"""A causal language model of transformers that was trained elsewhere: where it lies, what its config.json says.

Nothing is downloaded and no code of a folder is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from naming import expand_path

__all__ = [
    "Sizes",
    "base_folder",
    "decided",
    "lacking",
    "model_digest",
    "read_config",
    "require_known",
    "sizes_of",
]

INSTALL = "a pretrained base needs transformers from version 5 on: pip install -e '.[hf]'"
_OF_HEADS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_OF_FFN = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")  # where it is not 4 times the width
_OF_NAMES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


@dataclass(frozen=True)
class Sizes:
    """`positions`: the longest text; `head_width` of an attention head, of which there are `n_kv_heads` for keys;
    `ffn_hidden`: of the feed-forward layer."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    positions: int
    vocab_size: int
    ffn_hidden: int


def base_folder(name: str, revision: str | None) -> Path | None:
    """The folder of a base: the one that `name` is a path of, or what the hub's tool keeps of the name here; None where
    there is neither."""
    path = expand_path(name)
    if path.is_dir():
        return path.absolute()
    if find_spec("huggingface_hub") is None or len(Path(name).parts) > 2 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name that the hub could have
        return None


def lacking(name: str | None, revision: str | None) -> str:
    """Why a base cannot be read on this machine, "" where it can."""
    if not name:
        return (
            "model_cfg.base_model_name is not given: the folder of a causal language model of transformers, or its "
            "name on Hugging Face. Without one, type vanilla trains a model from scratch"
        )
    if not _has_transformers():
        return f"model_cfg.base_model_name: {INSTALL}"
    folder = base_folder(name, revision)
    if folder is None:
        at = f" --revision {revision}" if revision else ""
        return (
            f"model_cfg.base_model_name: '{name}' is not on this machine. Give a local folder, or download it once: "
            f"hf download {name}{at}"
        )
    if not (folder / "config.json").is_file():
        return f"model_cfg.base_model_name: {folder} holds no config.json, as save_pretrained of transformers writes it"
    return ""


@lru_cache(maxsize=1)
def _has_transformers() -> bool:
    if find_spec("transformers") is None:
        return False
    from transformers import __version__

    return int(__version__.partition(".")[0]) >= 5


def read_config(folder: Path) -> Any:
    """The `PretrainedConfig` of a folder. ValueError where transformers has no such model itself."""
    return _config(folder, (folder / "config.json").stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _config(folder: Path, changed: int) -> Any:
    del changed
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever it raises of what a file may say
        raise ValueError(
            f"model_cfg.base_model_name: transformers cannot read {folder / 'config.json'}, and code of a folder is "
            f"never executed: {' '.join(str(error).split())}"
        ) from None


def sizes_of(config: Any) -> Sizes:
    """Of a config that `require_known` took."""
    heads, width = config.num_attention_heads, config.hidden_size
    return Sizes(
        d_model=width,
        n_layers=config.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or width // heads,
        positions=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        ffn_hidden=next(
            (n for name in _OF_FFN if isinstance(n := getattr(config, name, None), int)), 4 * width
        ),
    )


def decided(config: Any) -> dict[str, Any]:
    """What a base decides besides sizes, by the names of fields of our own blocks, as far as its config says it."""
    rotary = getattr(config, "rope_parameters", None) or {}
    theta = (
        rotary.get("rope_theta")
        or getattr(config, "rope_theta", None)
        or getattr(config, "rotary_emb_base", None)
    )
    dropout = getattr(config, "attention_dropout", getattr(config, "attn_pdrop", None))
    found = {
        "use_rope": theta is not None or getattr(config, "rotary_dim", None) is not None,
        "rope_theta": theta,
        "attention_dropout": dropout,
        "tie_embeddings": getattr(config, "tie_word_embeddings", None),
    }
    return {name: value for name, value in found.items() if value is not None}


def require_known(config: Any, where: Path) -> None:
    """ValueError unless the model predicts the next token from full attention, dense layers and a plain head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = f"{where} is a {config.model_type}"
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"model_cfg.base_model_name: {kind}, which is no causal language model")
    needed = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
    )
    if missing := [name for name in needed if not isinstance(getattr(config, name, None), int)]:
        raise ValueError(
            f"model_cfg.base_model_name: {kind}, whose config.json does not say {', '.join(missing)}"
        )
    if none := [name for name in needed if getattr(config, name) < 1]:
        raise ValueError(f"model_cfg.base_model_name: {kind}, whose {none[0]} is {getattr(config, none[0])}")
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    strange = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if windows or strange:
        raise ValueError(
            f"model_cfg.base_model_name: {kind} whose layers do not all see the whole text "
            f"({', '.join(sorted(strange)) or f'sliding_window {config.sliding_window}'}), which is not known here"
        )
    if experts := [name for name in _OF_EXPERTS if getattr(config, name, None)]:
        raise ValueError(
            f"model_cfg.base_model_name: {kind} with experts ({experts[0]}), which is not known here"
        )
    if scaled := [name for name in _OF_HEADS if getattr(config, name, None) not in (None, 1, 1.0)]:
        raise ValueError(
            f"model_cfg.base_model_name: {kind} that changes its logits ({scaled[0]}), which is not known here"
        )


def model_digest(folder: Path, digest_of: Callable[[Path], str] | None) -> str:
    """sha256 that tells a base from others: of what its config.json says and of the digests of its files of weights,
    where it is known how to get at these."""
    entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in entries.items() if name not in _OF_NAMES}
    found = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    if digest_of:
        for path in sorted(folder.glob("*.safetensors")):
            found.update(f"{path.name} {digest_of(path)}\n".encode())
    return found.hexdigest()
