"""The same logits as `transformers` on tiny random models, weights carried both ways. No download."""

import pytest
import torch
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.glm4_moe import modeling_glm4_moe as glm4_moe
from transformers.models.llama import modeling_llama as llama
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.mixtral import modeling_mixtral as mixtral

from configs.messages import ConfigError
from kernels.precision import at_least_fp32
from models.huggingface import ROWS, form_of, to_config
from models.layers.decoder import Hidden
from tests.models.tiny import VOCABULARY, build, tokens_of

pytestmark = pytest.mark.xdist_group(
    "transformers"
)  # whose modules take a second to import, in one worker only
TOLERANCE = {"rtol": 0, "atol": 1e-8}


class TorchInFp64:
    """`torch` for a module that rounds to fp32 in places, even in an fp64 model: fp32 means fp64 here."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def _they_round_nowhere(monkeypatch):
    # Their norms, rotary tables and gates are cast to fp32, which alone makes differences of 1e-7.
    for module in (llama, mixtral, glm4_moe, deepseek_v3, mamba, mamba2):
        monkeypatch.setattr(module, "torch", TorchInFp64())
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t.to(at_least_fp32(t.dtype)))


def randomised(model):
    """fp64, every parameter random: a swapped bias or a forgotten gain must show."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # fp32 numbers, which ours are too
            buffer.copy_(torch.empty_like(buffer).normal_(std=0.3, generator=generator).to(torch.float32))
    return model


def hf_gpt2(tie=True):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=4, tie_word_embeddings=tie
    )
    return randomised(transformers.GPT2LMHeadModel(config))


def hf_llama(tie=True, n_kv_heads=4, bias=False):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=64,  # ceil(8/3 * 16) rounded up to 64
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=tie,
        attention_bias=bias,
        mlp_bias=bias,
    )
    return randomised(transformers.LlamaForCausalLM(config))


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "experts_implementation": "eager",  # the others refuse fp64
}


def hf_mixtral(window=None):
    config = transformers.MixtralConfig(
        **SIZES, intermediate_size=24, num_local_experts=3, num_experts_per_tok=2, sliding_window=window
    )
    return randomised(transformers.MixtralForCausalLM(config))


def hf_glm(tie=False, qk_norm=False, **entries):
    """The layers of DeepSeek-V3 between plain attention."""
    config = transformers.Glm4MoeConfig(
        **SIZES,
        **{
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
        },
        **{"n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
        **{"partial_rotary_factor": 1.0, "tie_word_embeddings": tie, "use_qk_norm": qk_norm},
        **entries,
    )
    return randomised(transformers.Glm4MoeForCausalLM(config))


STATES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}


def hf_mamba(tie=True, **entries):
    config = transformers.MambaConfig(**STATES, state_size=5, tie_word_embeddings=tie, **entries)
    return randomised(transformers.MambaForCausalLM(config))


def hf_mamba2(groups=1, tie=True, **entries):
    config = transformers.Mamba2Config(
        **STATES,
        **{"num_heads": 4, "head_dim": 8, "n_groups": groups, "state_size": 6, "chunk_size": 16},
        **{"tie_word_embeddings": tie},
        **entries,
    )
    return randomised(transformers.Mamba2ForCausalLM(config))


EXPERTS = {"n_kv_heads": 2, "d_ff_expert": 24, "tie_embeddings": False}
MIXTRAL = {**EXPERTS, "num_experts": 3, "top_k": 2}
GLM = {
    **EXPERTS,
    **{"gate_type": "deepseek_v3", "num_experts": 8, "top_k": 3, "n_shared_experts": 2, "first_k_dense": 1},
    **{"ffn_hidden": 40, "gate_norm_factor": 2.5},
}
MAMBA2 = {"version": 2, "headdim": 8, "d_state": 6}
PAIRS = {
    "gpt2": (lambda: hf_gpt2(), "gpt2", {}),
    "gpt2-untied": (lambda: hf_gpt2(tie=False), "gpt2", {"tie_embeddings": False}),
    "gpt2-unpadded": (lambda: hf_gpt2(), "gpt2", {"pad_vocab": False}),
    "llama": (lambda: hf_llama(), "vanilla", {}),
    "llama-grouped-untied": (
        lambda: hf_llama(tie=False, n_kv_heads=2),
        "vanilla",
        {"tie_embeddings": False, "n_kv_heads": 2},
    ),
    "llama-bias": (lambda: hf_llama(bias=True), "vanilla", {"bias": True}),
    "mixtral": (lambda: hf_mixtral(), "moe", MIXTRAL),
    "mixtral-window": (lambda: hf_mixtral(window=7), "moe", {**MIXTRAL, "sliding_window": 7}),
    "glm": (lambda: hf_glm(), "moe", GLM),
    "mamba": (lambda: hf_mamba(), "mamba", {"d_state": 5}),
    "mamba-untied-bias": (
        lambda: hf_mamba(False, use_bias=True, use_conv_bias=False, conv_kernel=3, time_step_rank=3),
        "mamba",
        {
            **{"d_state": 5, "tie_embeddings": False, "use_bias": True, "use_conv_bias": False},
            **{"d_conv": 3, "time_step_rank": 3},
        },
    ),
    "mamba2": (lambda: hf_mamba2(), "mamba", MAMBA2),
    "mamba2-groups-untied": (
        lambda: hf_mamba2(2, False, use_bias=True),
        "mamba",
        {**MAMBA2, "ngroups": 2, "tie_embeddings": False, "use_bias": True},
    ),
    "glm-groups-tied-norms": (
        lambda: hf_glm(True, True, n_group=4, topk_group=2),
        "moe",
        {**GLM, "n_group": 4, "topk_group": 2, "tie_embeddings": True, "qk_norm": True},
    ),
}


def in_their_layout(state, type_):
    """As version 5 holds it in memory: experts of a layer in stacks, gate and up as one."""
    if type_ != "moe":
        return state
    stacks, found = {}, {}
    for name, tensor in state.items():
        layer, within, matrix = name.replace("block_sparse_moe", "mlp").partition(".experts.")
        if within:
            stacks.setdefault(layer, {}).setdefault(matrix.split(".")[1], []).append(tensor)
        else:
            found[layer] = tensor
    for layer, matrices in stacks.items():
        gate, up, down = (torch.stack(matrices[a] if a in matrices else matrices[b]) for a, b in PARTS)
        found[f"{layer}.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        found[f"{layer}.experts.down_proj"] = down
    return found


PARTS = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))


def logits_of(model, tokens):
    with torch.no_grad():
        hidden = model(tokens)
        return model.logits(hidden.states if isinstance(hidden, Hidden) else hidden)


@pytest.mark.parametrize("pair", PAIRS)
def test_their_weights_in_our_model(pair):
    make, type_, fields = PAIRS[pair]
    theirs, ours, tokens = make(), build(type_, **fields), tokens_of(length=40)
    ours.from_hf_state_dict(theirs.state_dict())
    torch.testing.assert_close(logits_of(ours, tokens), theirs(tokens).logits, **TOLERANCE)


@pytest.mark.parametrize("pair", PAIRS)
def test_our_weights_in_their_model(pair):
    make, type_, fields = PAIRS[pair]
    theirs, ours, tokens = make(), build(type_, **fields), tokens_of(length=40)
    theirs.load_state_dict(in_their_layout(ours.to_hf_state_dict(), type_), strict=True)
    torch.testing.assert_close(theirs(tokens).logits, logits_of(ours, tokens), **TOLERANCE)


def test_fp32_parity():
    theirs, ours, tokens = hf_gpt2().to(torch.float32), build("gpt2", torch.float32), tokens_of(length=40)
    ours.from_hf_state_dict(theirs.state_dict())
    torch.testing.assert_close(logits_of(ours, tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_gpt2_without_biases_becomes_one_with_zero_biases():
    theirs, ours, tokens = hf_gpt2(), build("gpt2", bias=False), tokens_of(length=40)
    theirs.load_state_dict(ours.to_hf_state_dict(), strict=True)
    torch.testing.assert_close(theirs(tokens).logits, logits_of(ours, tokens), **TOLERANCE)
    again = build("gpt2", bias=False, seed=9)
    again.from_hf_state_dict(ours.to_hf_state_dict())
    torch.testing.assert_close(logits_of(again, tokens), logits_of(ours, tokens), **TOLERANCE)
    with pytest.raises(ValueError, match="unexpected .*bias"):
        again.from_hf_state_dict(hf_gpt2().state_dict())


@pytest.mark.parametrize(
    ("make", "type_", "base", "fields"),
    [
        (hf_gpt2, "gpt2", "transformer", {}),
        (hf_llama, "vanilla", "model", {}),
        (lambda: hf_glm(True), "moe", "model", {**GLM, "tie_embeddings": True}),
    ],
)
def test_a_base_model_file_loads_too(make, type_, base, fields):
    theirs, ours, tokens = make(), build(type_, **fields), tokens_of(length=40)
    state = dict(getattr(theirs, base).state_dict())
    if type_ == "gpt2":  # older files carry their causal masks
        state["h.0.attn.bias"], state["h.0.attn.masked_bias"] = torch.ones(1, 1, 64, 64), torch.tensor(-1e4)
    ours.from_hf_state_dict(state)
    torch.testing.assert_close(logits_of(ours, tokens), theirs(tokens).logits, **TOLERANCE)


@pytest.mark.parametrize(("make", "type_"), [(hf_gpt2, "gpt2"), (hf_llama, "vanilla")])
def test_missing_extra_and_misshapen_weights_are_errors(make, type_):
    ours, good = build(type_), make().state_dict()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    some = next(name for name in good if "mlp" in name)
    with pytest.raises(ValueError, match=f"missing 1: {some}"):
        ours.from_hf_state_dict({name: tensor for name, tensor in good.items() if name != some})
    with pytest.raises(ValueError, match="unexpected 1: .*extra.weight"):
        ours.from_hf_state_dict({**good, "extra.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=f"wrong 1: .*{some} is "):
        ours.from_hf_state_dict({**good, some: torch.ones(3, 3)})
    with pytest.raises(ValueError, match="tie_embeddings: false"):
        ours.from_hf_state_dict({**good, "lm_head.weight": torch.ones(VOCABULARY, 16)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_padding_is_stripped_on_the_way_out_and_zero_on_the_way_in():
    ours = build("gpt2")
    assert ours.to_hf_state_dict()["transformer.wte.weight"].shape == (VOCABULARY, 16)
    assert ours.to_hf_state_dict()["lm_head.weight"].shape == (VOCABULARY, 16)
    ours.from_hf_state_dict(hf_gpt2().state_dict())
    assert ours.wte.weight.shape == (128, 16)
    assert not ours.wte.weight[VOCABULARY:].any()


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rope": False},
        {"use_rmsnorm": False},
        {"use_swiglu": False},
        {"qk_norm": True},
        {"attn_softcap": 5.0},
        {"sliding_window": 4},
    ],
)
def test_what_llama_cannot_express_is_refused(fields):
    with pytest.raises(ValueError, match=f"no counterpart of {next(iter(fields))}"):
        build("vanilla", **fields).to_hf_state_dict()


@pytest.mark.parametrize("model_type", ROWS)
def test_the_table_knows_every_entry_of_their_config_and_its_default(model_type):
    # GLM rotates half of each head where nothing says otherwise, which is refused.
    said = {"partial_rotary_factor": 1.0} if model_type == "glm4_moe" else {}
    whole = transformers.AutoConfig.for_model(model_type, **said).to_dict()
    assert ROWS[model_type].read(whole, "") == ROWS[model_type].read(said, "")


@pytest.mark.parametrize(
    ("type_", "fields"),
    [
        ("gpt2", {}),
        ("vanilla", {"n_kv_heads": 2, "rope_theta": 500.0}),
        ("moe", {"d_ff_expert": None, "rope_theta": 500.0}),
        ("mamba", {"d_state": 5, "time_step_rank": 3}),
        ("mamba", {**MAMBA2, "ngroups": 2, "tie_embeddings": False}),
        ("moe", {"gate_type": "deepseek_v3", "qk_norm": True, "gate_norm_factor": 1.5}),
    ],
)
def test_their_model_of_our_config_has_our_shapes(type_, fields):
    ours = build(type_, torch.float32, **fields)
    config = transformers.AutoConfig.for_model(**to_config(type_, ours.cfg, bos_token_id=0, eos_token_id=0))
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(in_their_layout(ours.to_hf_state_dict(), type_), strict=True)
    tokens = tokens_of(length=40)
    torch.testing.assert_close(theirs.eval()(tokens).logits, logits_of(ours, tokens), rtol=0, atol=1e-5)


# -- experts -----------------------------------------------------------------------------------------------------------

SMALL = {
    "d_model": 8,
    "n_heads": 2,
    "num_experts": 3,
    "top_k": 2,
    "d_ff_expert": 12,
    "n_shared_experts": None,
}
GATES = [{"gate_type": "mixtral"}, {"gate_type": "deepseek_v3", "n_shared_experts": 1, "first_k_dense": 0}]


def small(gate, seed=0):
    model = build("moe", seed=seed, **{**SMALL, **gate})
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("gate", GATES, ids=["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("layout", [lambda state, type_: state, in_their_layout], ids=["single", "stacked"])
def test_experts_go_out_and_come_back_in_either_layout(layout, gate):
    ours, other = small(gate), small(gate, seed=1)
    other.from_hf_state_dict(layout(ours.to_hf_state_dict(), "moe"))
    state = ours.state_dict()
    assert any(name.endswith("e_score_correction_bias") for name in state) == ("first_k_dense" in gate)
    for name, tensor in other.state_dict().items():
        rows = VOCABULARY if "embed" in name else len(tensor)  # without padding
        assert torch.equal(tensor[:rows], state[name][:rows]), name


@pytest.mark.parametrize("gate", GATES, ids=["mixtral", "deepseek_v3"])
def test_a_key_of_experts_that_lacks_is_an_error(gate):
    """In every place of either layout, and nothing is loaded."""
    state, other = small(gate).to_hf_state_dict(), small(gate, seed=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for layout in (state, in_their_layout(state, "moe")):
        for name in layout:
            if "experts" in name or "gate" in name:
                with pytest.raises(ValueError, match="missing"):
                    other.from_hf_state_dict({n: t for n, t in layout.items() if n != name})
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_more_experts_than_there_are_is_an_error():
    state = in_their_layout(small({**GATES[0], "num_experts": 4}).to_hf_state_dict(), "moe")
    with pytest.raises(ValueError, match=r"unexpected .*experts\.3\.w1\.weight"):
        small(GATES[0]).from_hf_state_dict(state)


@pytest.mark.parametrize("pair", ["mixtral", "glm"])
def test_gate_and_up_exchanged_would_be_seen(pair):
    """They have one shape; so has a layer with another."""
    make, type_, fields = PAIRS[pair]
    theirs, ours, tokens = make(), build(type_, **fields), tokens_of(length=40)
    state = theirs.state_dict()
    for name in [name for name in state if name.endswith("gate_up_proj")]:
        state[name] = torch.cat(state[name].chunk(2, 1)[::-1], 1)
    ours.from_hf_state_dict(state)
    assert (logits_of(ours, tokens) - theirs(tokens).logits).abs().max() > 0.1


def test_the_layer_of_deepseek_v3_is_that_of_its_own_class():
    config = transformers.DeepseekV3Config(
        **{"hidden_size": 16, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3},
        **{"n_shared_experts": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        experts_implementation="eager",
    )
    theirs = randomised(deepseek_v3.DeepseekV3MoE(config))
    ours = build("moe", **{**GLM, "n_group": 4, "topk_group": 2})
    within = {f"model.layers.1.mlp.{name}": tensor for name, tensor in theirs.state_dict().items()}
    ours.from_hf_state_dict({**in_their_layout(ours.to_hf_state_dict(), "moe"), **within})
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.layers[1].mlp(x)[0], theirs(x), **TOLERANCE)


def test_the_whole_model_of_deepseek_is_refused_with_the_reason():
    for model_type in ("deepseek_v2", "deepseek_v3"):
        entries = transformers.AutoConfig.for_model(model_type).to_dict()
        with pytest.raises(ConfigError, match="latent keys and values .*as glm4_moe"):
            form_of(entries, "config.json")
