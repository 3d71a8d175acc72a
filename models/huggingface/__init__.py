"""The table of architectures that Hugging Face `transformers` has too: which entry of its config.json is which field.

Imports no torch: sizes are read while a command line is understood. One more architecture is one more row; `row.py`
reads and writes by it, and `models/layers/huggingface.py` carries the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from configs.messages import ConfigError
from models.huggingface.row import Field, Row
from naming import not_one_of

if TYPE_CHECKING:
    from configs.schema import ModelConfig

__all__ = ["ROWS", "Field", "Row", "form_of", "to_config"]

# `model_type` in config.json -> row. Defaults are those of the classes of transformers 5, which leave out of the file
# what has its default.
ROWS: dict[str, Row] = {
    "gpt2": Row(
        type="gpt2",
        name="GPT-2",
        classes=("GPT2LMHeadModel", "GPT2Model"),
        fields={
            "vocab_size": Field("vocab_size", int, 50257),
            "n_positions": Field("n_ctx", int, 1024),
            "n_embd": Field("d_model", int, 768),
            "n_layer": Field("n_layers", int, 12),
            "n_head": Field("n_heads", int, 12),
            "tie_word_embeddings": Field("tie_embeddings", bool, True),
        },
        required={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "layer_norm_epsilon": (1e-5,),
            "n_inner": lambda fields: (None, 4 * fields["d_model"]),
            "scale_attn_weights": (True,),
        },
        ours={},
        dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
        spellings={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        # The heads of other tasks; the size of a causal mask; an order of operations that changes rounding alone; what
        # versions before 3 wrote and the published medium, large and xl still say.
        ignored={
            *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
            *("summary_first_dropout", "n_ctx", "reorder_and_upcast_attn"),
            *("n_special", "predict_special_tokens", "output_past"),
        },
    ),
    "llama": Row(
        type="vanilla",
        name="Llama",
        classes=("LlamaForCausalLM", "LlamaModel"),
        fields={
            "vocab_size": Field("vocab_size", int, 32000),
            "max_position_embeddings": Field("n_ctx", int, 2048),
            "hidden_size": Field("d_model", int, 4096),
            "num_hidden_layers": Field("n_layers", int, 32),
            "num_attention_heads": Field("n_heads", int, 32),
            "num_key_value_heads": Field("n_kv_heads", int, "num_attention_heads", written="kv_heads"),
            "intermediate_size": Field("ffn_hidden", int, 11008, written="hidden_width"),
            "rms_norm_eps": Field("norm_eps", float, 1e-6),
            "rope_theta": Field("rope_theta", float, 10000.0),
            "tie_word_embeddings": Field("tie_embeddings", bool, False),
            "attention_bias": Field("bias", bool, False),
            "mlp_bias": Field("bias", bool, False),
        },
        required={
            "hidden_act": ("silu", "swish"),
            "head_dim": lambda fields: (None, fields["d_model"] // fields["n_heads"]),
        },
        ours={
            "use_rope": True,
            "use_rmsnorm": True,
            "use_swiglu": True,
            "qk_norm": False,
            "attn_softcap": None,
            "sliding_window": None,
        },
        dropouts=("attention_dropout",),
        # How many pieces a product is computed in; what some published files repeat.
        ignored={"pretraining_tp", "is_llama_config", "max_sequence_length"},
    ),
}


def form_of(config: Mapping[str, Any], source: str) -> Row:
    """The row of a config.json. ConfigError lists what there is."""
    given = config.get("model_type")
    if given is None:
        raise ConfigError(f"{source}: no model_type. Architectures that are read: {', '.join(ROWS)}")
    if not isinstance(given, str) or given not in ROWS:
        raise ConfigError(f"{source}: model_type: {not_one_of(given, ROWS)}")
    return ROWS[given]


def to_config(type_: str, model_cfg: ModelConfig, **entries: Any) -> dict[str, Any]:
    """The config.json of a model of ours, its `vocab_size` filled in, with further entries (bos_token_id, dtype).

    Raises:
        ValueError: transformers has no such architecture, or none with these fields.
    """
    for model_type, row in ROWS.items():
        if row.type == type_:
            return {"model_type": model_type, **row.write(model_cfg), **entries}
    have = ", ".join(row.type for row in ROWS.values())
    raise ValueError(f"type {type_} has no form in Hugging Face transformers; {have} have one")
