"""The table: config.json to fields and back, and every entry that we do not compute refused by name."""

from types import SimpleNamespace

import pytest

from configs.messages import ConfigError
from models import ARCHITECTURES
from models.gpt2 import GPT2Config
from models.huggingface import ROWS, Field, Row, form_of, to_config
from models.moe import MoEConfig
from models.vanilla import VanillaConfig
from naming import load

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 300}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "vocab_size": 300,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_key_value_heads": 2}
GLM = {
    **{**LLAMA, "model_type": "glm4_moe", "num_key_value_heads": 2, "partial_rotary_factor": 1.0},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2},
}
MAMBA = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 300}
MAMBA2 = {**MAMBA, "model_type": "mamba2", "num_heads": 4, "head_dim": 32, "n_groups": 2, "use_bias": False}
PLAIN = {
    **{"gpt2": GPT2, "llama": LLAMA, "mixtral": MIXTRAL, "glm4_moe": GLM},
    **{"mamba": MAMBA, "mamba2": MAMBA2},
}


def fields(model_type, **entries):
    config = {**PLAIN[model_type], **entries}
    return form_of(config, "config.json").read(config, "config.json")


def refusals(model_type, **entries):
    with pytest.raises(ConfigError) as caught:
        fields(model_type, **entries)
    return caught.value.problems


# --- reading -------------------------------------------------------------------------------------------


def test_sizes_are_read():
    assert fields("gpt2") == {
        **{
            "vocab_size": 300,
            "n_ctx": 32,
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
            "ffn_hidden": None,
            "tie_embeddings": True,
        }
    }
    assert fields("llama", num_key_value_heads=2, rms_norm_eps=1e-5, attention_bias=True, mlp_bias=True) == {
        **{"vocab_size": 300, "n_ctx": 32, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2},
        **{"ffn_hidden": 96, "norm_eps": 1e-5, "rope_theta": 10000.0, "tie_embeddings": False, "bias": True},
        **{"use_rope": True, "use_rmsnorm": True, "use_swiglu": True, "qk_norm": False},
        **{"attn_softcap": None, "sliding_window": None},
    }


def test_experts_are_read():
    read = fields("mixtral", num_experts_per_tok=3, sliding_window=16)
    assert read | {"num_experts": 4, "top_k": 3, "d_ff_expert": 96, "sliding_window": 16} == read
    assert read | {"gate_type": "mixtral", "n_shared_experts": 0, "first_k_dense": 0, "moe_every": 1} == read
    read = fields("glm4_moe", first_k_dense_replace=0, routed_scaling_factor=2.5, n_group=4, topk_group=2)
    assert read | {"num_experts": 8, "top_k": 3, "d_ff_expert": 24, "n_shared_experts": 2} == read
    assert read | {"ffn_hidden": 96, "first_k_dense": 0, "gate_norm_factor": 2.5, "qk_norm": False} == read
    assert read | {"gate_type": "deepseek_v3", "n_group": 4, "topk_group": 2} == read


def test_states_are_read():
    read = fields("mamba", time_step_rank="auto", conv_kernel=3)
    assert read | {"d_state": 8, "time_step_rank": 4, "d_conv": 3, "version": 1, "d_intermediate": 0} == read
    assert fields("mamba", time_step_rank=7)["time_step_rank"] == 7
    read = fields("mamba2")
    assert read | {"version": 2, "headdim": 32, "ngroups": 2, "tie_embeddings": False, "expand": 2} == read
    assert refusals("mamba2", num_heads=8) == [
        "config.json: num_heads is 8: Mamba-2 is computed with 4 here",
    ]
    assert refusals("mamba", hidden_act="gelu") and refusals("mamba2", time_step_limit=[0.1, 0.2])


@pytest.mark.parametrize("entries", [{}, {"num_key_value_heads": None}])
def test_key_heads_left_out_or_null_are_as_many_as_heads(entries):
    assert fields("llama", **entries)["n_kv_heads"] == 4


def test_the_general_names_of_gpt2s_entries_are_read_too():
    spelled = {
        "model_type": "gpt2",
        "hidden_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
    }
    read = form_of(spelled, "").read(spelled, "")
    assert (read["d_model"], read["n_heads"], read["n_ctx"], read["n_layers"]) == (64, 2, 8, 12)
    assert refusals("gpt2", hidden_size=32) == [
        "config.json: hidden_size is 32, n_embd 64: they are one entry, and differ"
    ]


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 500000, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}, "partial_rotary_factor": 1.0},
    ],
)
def test_rotary_positions_are_read_as_every_version_writes_them(entries):
    assert fields("llama", **entries)["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("model_type", "entries"),
    [
        (
            "gpt2",
            {"resid_pdrop": 0.1, "dtype": "bfloat16", "task_specific_params": {"text": {"max_length": 5}}},
        ),
        (
            "gpt2",
            {"activation_function": "gelu_pytorch_tanh", "n_inner": None, "bos_token_id": 0, "n_ctx": 32},
        ),
        ("llama", {"head_dim": 16, "torch_dtype": "float16", "pretraining_tp": 2, "attention_dropout": 0.1}),
        ("llama", {"quantization_config": None, "use_sliding_window": False, "pruned_heads": {}}),
    ],
)
def test_what_changes_nothing_is_no_hindrance(model_type, entries):
    assert fields(model_type, **entries) == fields(model_type)


# As they are published; what is left out here says the same as in GPT2 and LLAMA.
PUBLISHED = {
    "gpt2-medium": ("gpt2", {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_special": 0, "predict_special_tokens": True,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }),
    "distilgpt2": ("gpt2", {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}),
    "mamba-130m-hf": ("mamba", {
        "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 128, "d_model": 64,
        "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "initializer_range": 0.1,
        "intermediate_size": 128, "layer_norm_epsilon": 1e-05, "n_layer": 2, "pad_token_id": 0,
        "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True,
        "ssm_cfg": {}, "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1,
        "time_step_min": 0.001, "time_step_rank": 4, "time_step_scale": 1.0, "torch_dtype": "float32",
        "transformers_version": "4.39.0.dev0", "use_bias": False, "use_cache": True, "use_conv_bias": True,
    }),
    "gpt2-xl": ("gpt2", {"output_past": True}),
    "Llama-2-7b": ("llama", {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "pretraining_tp": 1,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": True,
    }),
    "Mixtral-8x7B-v0.1": ("mixtral", {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "initializer_range": 0.02, "output_router_logits": False, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "num_experts_per_tok": 2,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
    }),
    "SmolLM2-135M": ("llama", {
        "attention_bias": False, "attention_dropout": 0.0, "is_llama_config": True, "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "rope_theta": 10000,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read(name):
    model_type, entries = PUBLISHED[name]
    assert fields(model_type, **entries) == fields(model_type)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0}
REFUSED = [
    ("gpt2", {"activation_function": "relu"}, 'activation_function is "relu": GPT-2 is computed with "gelu_new" or'),
    ("gpt2", {"n_inner": 0}, "n_inner is 0: a whole number from 1 on, or null, is needed"),
    ("gpt2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06: GPT-2 is computed with 1e-05 here"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is false: GPT-2 is computed with true here"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true: this is not"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is true: this is not computed here"),
    ("gpt2", {"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}: this is not computed here'),
    ("gpt2", {"architectures": ["GPT2ForTokenClassification"]}, "weights of a GPT2LMHeadModel are read"),
    ("gpt2", {"architectures": "GPT2LMHeadModel"}, 'architectures is "GPT2LMHeadModel": weights of a GPT2LMHeadModel'),
    ("gpt2", {"odd": [7] * 999}, "odd is [" + "7, " * 65 + "7...: this is not"),
    ("gpt2", {"n_embd": "64"}, 'n_embd is "64": a whole number from 1 on is needed'),
    ("gpt2", {"n_layer": 0}, "n_layer is 0: a whole number from 1 on is needed"),
    ("gpt2", {"n_head": True}, "n_head is true: a whole number from 1 on is needed"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1: true or false is needed"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps is null: a number above 0 is needed"),
    ("llama", {"rope_scaling": LLAMA3}, 'rope_scaling is {"rope_type": "llama3", "factor": 8.0'),
    ("llama", {"rope_parameters": LLAMA3}, 'rope_parameters is {"rope_type": "llama3", "factor": 8.0'),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters is {"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: this is not computed here"),
    ("llama", {"attention_bias": True}, "attention_bias is true, mlp_bias is false: here model_cfg.bias is"),
    ("llama", {"sliding_window": 4096}, "sliding_window is 4096: this is not computed here"),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu": Llama is computed with "silu" or "swish" here'),
    ("llama", {"head_dim": 32}, "head_dim is 32: Llama is computed with null or 16 here"),
    ("mixtral", {"num_key_value_heads": 0}, "num_key_value_heads is 0: a whole number from 1 on, or null, is needed"),
    ("mixtral", {"head_dim": 32}, "head_dim is 32: Mixtral is computed with null or 16 here"),
    ("glm4_moe", {"partial_rotary_factor": None}, "partial_rotary_factor is 0.5: GLM-4 MoE is computed with 1.0 here"),
    ("glm4_moe", {"rope_parameters": {"rope_theta": 5e5}, "partial_rotary_factor": 0.5}, "rotary_factor is 0.5"),
    ("glm4_moe", {"attention_bias": True}, "attention_bias is true: GLM-4 MoE is computed with false here"),
    ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob is false: GLM-4 MoE is computed with true here"),
    ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts is 0: a whole number from 1 on is needed"),
    ("llama", {"attention_multiplier": 0}, "attention_multiplier is 0: this is not computed here"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "entries", "message"), REFUSED, ids=lambda v: None)
def test_what_is_not_computed_is_refused_by_name(model_type, entries, message):
    (problem,) = refusals(model_type, **entries)
    assert problem.startswith("config.json: ") and message in problem


def test_all_refusals_come_together():
    told = refusals("llama", hidden_act="gelu", sliding_window=4, rope_scaling=LLAMA3)
    assert [problem.split()[1] for problem in told] == ["hidden_act", "sliding_window", "rope_scaling"]
    told = refusals("llama", hidden_size="64", sliding_window=4)
    assert [problem.split()[1] for problem in told] == ["hidden_size", "sliding_window"]


def test_an_unknown_model_type_lists_what_there_is():
    known = "gpt2, llama, mamba, mamba2, mixtral, glm4_moe"
    with pytest.raises(
        ConfigError, match=f"c.json: model_type: 'gpt3' is not one of {known}. Did you mean 'gpt2'"
    ):
        form_of({"model_type": "gpt3"}, "c.json")
    with pytest.raises(ConfigError, match=f"c.json: no model_type. Architectures that are read: {known}"):
        form_of({}, "c.json")


# --- writing -------------------------------------------------------------------------------------------

CONFIGS = {
    "gpt2": [
        {},
        {"n_ctx": 7, "d_model": 60, "n_heads": 5, "n_layers": 3, "dropout": 0.2, "tie_embeddings": False},
        {"bias": False, "pad_vocab": False, "wpe_init_std": 0.01},
    ],
    "vanilla": [
        {},
        {"n_kv_heads": 3, "ffn_hidden": 77, "rope_theta": 5e5, "norm_eps": 1e-6, "bias": True},
        {"multiple_of": 128, "tie_embeddings": False, "dropout": 0.1},
    ],
    "moe": [
        {},
        {"num_experts": 5, "top_k": 3, "d_ff_expert": 40, "sliding_window": 9, "n_kv_heads": 3},
        {"gate_type": "deepseek_v3"},
        {
            **{
                "gate_type": "deepseek_v3",
                "first_k_dense": 0,
                "n_shared_experts": 2,
                "gate_norm_factor": 2.5,
            },
            **{"n_group": 4, "topk_group": 2, "qk_norm": True, "ffn_hidden": 77, "dropout": 0.1},
        },
    ],
}
CASES = [(type_, cfg) for type_, given in CONFIGS.items() for cfg in given]


@pytest.mark.parametrize(("type_", "given"), CASES)
def test_what_is_written_reads_as_the_same_model(type_, given):
    cls = {"gpt2": GPT2Config, "vanilla": VanillaConfig, "moe": MoEConfig}[type_]
    cfg = cls(vocab_size=321, **given)
    written = to_config(type_, cfg, bos_token_id=3)
    assert written["bos_token_id"] == 3
    row = form_of(written, "")
    again = cfg.model_copy(update=row.read(written, ""))
    resolved = {field.name: row.in_force.get(field.name, field.name) for field in row.fields.values()}
    resolved |= {name: row.in_force.get(name, name) for name in row.ours}
    for name in cls.model_fields:
        assert getattr(again, name) == getattr(cfg, resolved.get(name, name)), name
    assert to_config(type_, again, bos_token_id=3) == written


def test_every_row_is_an_architecture_with_every_field_said():
    for row in ROWS.values():
        config = load(ARCHITECTURES[row.type].model).Config
        known = {field.name for field in row.fields.values()} | row.ours.keys()
        assert known <= config.model_fields.keys()
        assert not known & config.free(), "free fields stay the run's"


def test_what_has_no_form_there_is_refused_by_field():
    cfg = VanillaConfig(vocab_size=9, use_rope=False, attn_softcap=5.0)
    with pytest.raises(ValueError, match="Llama has no counterpart of use_rope: false, attn_softcap: 5.0"):
        to_config("vanilla", cfg)
    with pytest.raises(
        ValueError,
        match="type mdl has no form in Hugging Face transformers; gpt2, vanilla, mamba, moe have one",
    ):
        to_config("mdl", cfg)


def test_of_two_rows_the_nearest_says_what_is_lacking():
    """By its gate; other fields may be what it has not."""
    for gate, model_type in (("mixtral", "mixtral"), ("deepseek_v3", "glm4_moe")):
        assert to_config("moe", MoEConfig(vocab_size=9, gate_type=gate))["model_type"] == model_type
    cfg = MoEConfig(vocab_size=9, qk_norm=True, first_k_dense=1)
    with pytest.raises(ValueError, match="Mixtral has no counterpart of qk_norm: true, first_k_dense: 1"):
        to_config("moe", cfg)
    cfg = MoEConfig(vocab_size=9, gate_type="deepseek_v3", bias=True, n_shared_experts=0)
    with pytest.raises(ValueError, match="GLM-4 MoE has no counterpart of bias: true, n_shared_experts: 0"):
        to_config("moe", cfg)


def test_one_more_architecture_is_one_more_row(monkeypatch):
    row = Row(
        type="toy",
        name="Toy",
        classes=("ToyForCausalLM", "ToyModel"),
        fields={"width": Field("d_model", int, 8)},
        required={"act": ("relu",)},
        ours={"gated": False},
    )
    monkeypatch.setitem(ROWS, "toy-lm", row)
    config = to_config("toy", SimpleNamespace(d_model=16, gated=False))
    assert config == {"model_type": "toy-lm", "architectures": ["ToyForCausalLM"], "width": 16, "act": "relu"}
    assert form_of(config, "").read(config, "") == {"d_model": 16, "gated": False}
    with pytest.raises(ValueError, match="Toy has no counterpart of gated: true"):
        to_config("toy", SimpleNamespace(d_model=16, gated=True))
