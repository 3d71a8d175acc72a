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

__all__ = ["ROWS", "Field", "Row", "form_of", "model_type_of", "to_config"]

_WIDTHS = {"n_kv_heads": "kv_heads", "ffn_hidden": "hidden_width"}
_OF_EXPERTS = {
    "num_experts": "experts",
    "top_k": "chosen",
    "n_shared_experts": "shared",
    "d_ff_expert": "expert_width",
    "first_k_dense": "dense_layers",
    "gate_norm_factor": "factor",
}

_STATES = {"d_state": "states", "time_step_rank": "rank"}
# Of initialisation; how it is computed; what other programs wrote.
_OF_MAMBA = {
    *("time_step_scale", "time_step_min", "time_step_max", "time_step_floor", "time_step_init_scheme"),
    *("rescale_prenorm_residual", "use_mambapy", "use_associative_scan", "fused_add_norm"),
    *("pad_vocab_size_multiple", "layer_types"),
}


def _mamba(**defaults: Any) -> dict[str, Field]:
    """Entries that both versions have; `defaults` where they differ."""
    return {
        "vocab_size": Field("vocab_size", int, defaults["vocab_size"]),
        "hidden_size": Field("d_model", int, defaults["hidden_size"]),
        "num_hidden_layers": Field("n_layers", int, defaults["num_hidden_layers"]),
        "state_size": Field("d_state", int, defaults["state_size"]),
        "expand": Field("expand", int, 2),
        "conv_kernel": Field("d_conv", int, 4),
        "use_bias": Field("use_bias", bool, False),
        "use_conv_bias": Field("use_conv_bias", bool, True),
        "layer_norm_epsilon": Field("norm_eps", float, 1e-5),
        "residual_in_fp32": Field("residual_in_fp32", bool, True),
        "tie_word_embeddings": Field("tie_embeddings", bool, defaults["tie_word_embeddings"]),
    }


def _rank(entries: Mapping[str, Any]) -> int:
    return -(-entries.get("hidden_size", 768) // 16)


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
            "n_inner": Field("ffn_hidden", int, None, nullable=True),
            "tie_word_embeddings": Field("tie_embeddings", bool, True),
        },
        required={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "layer_norm_epsilon": (1e-5,),
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
            "num_key_value_heads": Field("n_kv_heads", int, "num_attention_heads"),
            "intermediate_size": Field("ffn_hidden", int, 11008),
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
        in_force=_WIDTHS,
        dropouts=("attention_dropout",),
        # How many pieces a product is computed in; what some published files repeat.
        ignored={"pretraining_tp", "is_llama_config", "max_sequence_length"},
    ),
    "mamba": Row(
        type="mamba",
        name="Mamba",
        classes=("MambaForCausalLM", "MambaModel"),
        fields={
            **_mamba(
                vocab_size=50280,
                hidden_size=768,
                num_hidden_layers=32,
                state_size=16,
                tie_word_embeddings=True,
            ),
            "time_step_rank": Field("time_step_rank", int, _rank),
        },
        required={
            "hidden_act": ("silu", "swish"),
            "intermediate_size": lambda fields: (None, fields["expand"] * fields["d_model"]),
            "rms_norm": lambda fields: (True,),
        },
        ours={"version": 1, "d_intermediate": 0},
        in_force=_STATES,
        spellings={"d_model": "hidden_size", "n_layer": "num_hidden_layers", "d_inner": "intermediate_size"},
        ignored=_OF_MAMBA,
    ),
    "mamba2": Row(
        type="mamba",
        name="Mamba-2",
        classes=("Mamba2ForCausalLM", "Mamba2Model"),
        fields={
            **_mamba(
                vocab_size=32768,
                hidden_size=4096,
                num_hidden_layers=64,
                state_size=128,
                tie_word_embeddings=False,
            ),
            "head_dim": Field("headdim", int, 64),
            "n_groups": Field("ngroups", int, 8),
        },
        required={
            "hidden_act": ("silu", "swish"),
            "num_heads": lambda fields: (fields["expand"] * fields["d_model"] // fields["headdim"],),
            "time_step_limit": lambda fields: ([0.0, float("inf")], (0.0, float("inf"))),
            "rms_norm": lambda fields: (True,),
        },
        derived={"num_heads": "heads"},
        ours={"version": 2, "d_intermediate": 0},
        in_force=_STATES,
        ignored={*_OF_MAMBA, "time_step_rank", "chunk_size"},
    ),
    "mixtral": Row(
        type="moe",
        name="Mixtral",
        classes=("MixtralForCausalLM", "MixtralModel"),
        fields={
            "vocab_size": Field("vocab_size", int, 32000),
            "max_position_embeddings": Field("n_ctx", int, 131072),
            "hidden_size": Field("d_model", int, 4096),
            "num_hidden_layers": Field("n_layers", int, 32),
            "num_attention_heads": Field("n_heads", int, 32),
            "num_key_value_heads": Field("n_kv_heads", int, 8, nullable=True),
            "intermediate_size": Field("d_ff_expert", int, 14336),
            "num_local_experts": Field("num_experts", int, 8),
            "num_experts_per_tok": Field("top_k", int, 2),
            "rms_norm_eps": Field("norm_eps", float, 1e-5),
            "rope_theta": Field("rope_theta", float, 1e6),
            "sliding_window": Field("sliding_window", int, None, nullable=True),
            "tie_word_embeddings": Field("tie_embeddings", bool, False),
        },
        required={
            "hidden_act": ("silu", "swish"),
            "head_dim": lambda fields: (None, fields["d_model"] // fields["n_heads"]),
        },
        ours={
            **{"use_rope": True, "use_rmsnorm": True, "use_swiglu": True, "bias": False, "qk_norm": False},
            **{"attn_softcap": None, "gate_type": "mixtral", "n_shared_experts": 0},
            **{"first_k_dense": 0, "moe_every": 1},
        },
        in_force=_WIDTHS | _OF_EXPERTS,
        dropouts=("attention_dropout",),
        spellings={"num_experts": "num_local_experts"},
        # Of training.
        ignored={"router_aux_loss_coef", "router_jitter_noise", "output_router_logits"},
        experts={"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
    # The layers of DeepSeek-V3 between plain attention; its own model attends over latent keys, which none here does.
    "glm4_moe": Row(
        type="moe",
        name="GLM-4 MoE",
        classes=("Glm4MoeForCausalLM", "Glm4MoeModel"),
        fields={
            "vocab_size": Field("vocab_size", int, 151552),
            "max_position_embeddings": Field("n_ctx", int, 131072),
            "hidden_size": Field("d_model", int, 4096),
            "num_hidden_layers": Field("n_layers", int, 46),
            "num_attention_heads": Field("n_heads", int, 96),
            "num_key_value_heads": Field("n_kv_heads", int, 8),
            "intermediate_size": Field("ffn_hidden", int, 10944),
            "moe_intermediate_size": Field("d_ff_expert", int, 1408),
            "n_routed_experts": Field("num_experts", int, 128),
            "num_experts_per_tok": Field("top_k", int, 8),
            "n_shared_experts": Field("n_shared_experts", int, 1),
            "first_k_dense_replace": Field("first_k_dense", int, 1, least=0),
            "n_group": Field("n_group", int, 1),
            "topk_group": Field("topk_group", int, 1),
            "routed_scaling_factor": Field("gate_norm_factor", float, 1.0),
            "rms_norm_eps": Field("norm_eps", float, 1e-5),
            "rope_theta": Field("rope_theta", float, 10000.0),
            "use_qk_norm": Field("qk_norm", bool, False),
            "tie_word_embeddings": Field("tie_embeddings", bool, False),
        },
        required={
            "hidden_act": ("silu", "swish"),
            "head_dim": lambda fields: (None, fields["d_model"] // fields["n_heads"]),
            "attention_bias": (False,),
            "norm_topk_prob": (True,),
            "partial_rotary_factor": (1.0,),
            # Modules behind the model that draft tokens, and change none.
            "num_nextn_predict_layers": (0, 1),
        },
        ours={
            **{"use_rope": True, "use_rmsnorm": True, "use_swiglu": True, "bias": False},
            **{"attn_softcap": None, "sliding_window": None, "gate_type": "deepseek_v3", "moe_every": 1},
        },
        in_force=_WIDTHS | _OF_EXPERTS,
        dropouts=("attention_dropout",),
        spellings={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
        ignored={"output_router_logits"},
        rotated=0.5,
        experts={part: part for part in ("mlp", "gate_proj", "up_proj", "down_proj")},
    ),
}


# Asked for by those who know the layers of ours that they are made of.
_LATENT = (
    "it attends over latent keys and values (MLA), which is not computed here. Its layers of experts are those of type "
    "moe with model_cfg.gate_type=deepseek_v3; with plain attention transformers has them as glm4_moe"
)
_BEYOND = {"deepseek_v2": _LATENT, "deepseek_v3": _LATENT}


def form_of(config: Mapping[str, Any], source: str) -> Row:
    """The row of a config.json. ConfigError lists what there is."""
    given = config.get("model_type")
    if given is None:
        raise ConfigError(f"{source}: no model_type. Architectures that are read: {', '.join(ROWS)}")
    if isinstance(given, str) and given in _BEYOND:
        raise ConfigError(f"{source}: model_type is {given}: {_BEYOND[given]}")
    if not isinstance(given, str) or given not in ROWS:
        raise ConfigError(
            f"{source}: model_type: {not_one_of(given, ROWS)}. A causal model of another type may be a base: "
            f"type=memory_adapter model_cfg.base_model_name=<its folder>"
        )
    return ROWS[given]


def to_config(type_: str, model_cfg: ModelConfig, **entries: Any) -> dict[str, Any]:
    """The config.json of a model of ours, its `vocab_size` filled in, with further entries (bos_token_id, dtype).

    Raises:
        ValueError: transformers has no such architecture, or none with these fields.
    """
    model_type = model_type_of(type_, model_cfg)
    return {"model_type": model_type, **ROWS[model_type].write(model_cfg), **entries}


def model_type_of(type_: str, model_cfg: ModelConfig) -> str:
    """Of the rows of our type that which such a model has, else the nearest. ValueError where there is none."""
    rows = {model_type: row for model_type, row in ROWS.items() if row.type == type_}
    if not rows:
        have = ", ".join(dict.fromkeys(row.type for row in ROWS.values()))
        raise ValueError(f"type {type_} has no form in Hugging Face transformers; {have} have one")
    return min(rows, key=lambda model_type: len(rows[model_type].beyond(model_cfg)))
