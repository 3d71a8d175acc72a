"""Entries of config.json that every architecture of `transformers` may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["IGNORED", "unnested"]

# They change nothing of what a language model computes from its tokens: names, types, ids, heads of other tasks, how
# text is drawn (which a run here says for itself), how something is computed.
IGNORED = {
    # what the file is
    *("model_type", "architectures", "_name_or_path", "name_or_path", "transformers_version", "_commit_hash"),
    *("tokenizer_class", "unsloth_version", "unsloth_fixed", "transformers.js_config"),
    # the type of the weights, which their file says
    *("dtype", "torch_dtype", "use_bfloat16"),
    # training
    *("initializer_range", "gradient_checkpointing", "torchscript"),
    # tokens; the tokenizer's files say it
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "prefix"),
    # what is given back, and how it is computed
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_scores", "is_decoder"),
    *("return_dict_in_generate", "chunk_size_feed_forward", "attn_implementation", "_attn_implementation"),
    *(
        "_attn_implementation_autoset",
        "_flash_attn_2_enabled",
        "cache_implementation",
        "tie_last_hidden_states",
    ),
    # other tasks
    *(
        "id2label",
        "label2id",
        "num_labels",
        "_num_labels",
        "problem_type",
        "finetuning_task",
        "task_specific_params",
    ),
    # generation
    *(
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
    ),
    *("diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
    *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    # models of two parts, which none here is
    *("tie_encoder_decoder", "tf_legacy_loss"),
}


# What says of rotary positions that they are as they are.
_PLAIN = (
    ("rope_type", "default"),
    ("type", "default"),
    ("partial_rotary_factor", 1),
    ("partial_rotary_factor", None),
)


def unnested(config: Mapping[str, Any], rotated: float = 1.0) -> dict[str, Any]:
    """`rope_parameters: {rope_theta, rope_type: default}` of transformers 5, and a `rope_scaling` that scales nothing,
    as the `rope_theta` of the versions before it. What asks for more stays, for the row to refuse; so does a
    `partial_rotary_factor`, which is `rotated` where nothing says it, other than 1."""
    entries = dict(config)
    parts = [entries.pop("partial_rotary_factor", None)]
    for name in ("rope_parameters", "rope_scaling"):
        inner = entries.get(name)
        if not isinstance(inner, Mapping):
            continue
        parts.append(inner.get("partial_rotary_factor"))
        rest = {k: v for k, v in inner.items() if (k, v) not in _PLAIN and k != "rope_theta"}
        if not rest:
            del entries[name]
            entries |= {k: v for k, v in inner.items() if k == "rope_theta" and v is not None}
    if not any(isinstance(entries.get(name), Mapping) for name in ("rope_parameters", "rope_scaling")):
        part = next((part for part in parts if part is not None), rotated)
        entries |= {} if part == 1 else {"partial_rotary_factor": part}
    return entries
