"""The same logits as `transformers` on tiny random models, weights carried both ways. No download."""

import pytest
import torch
import transformers

from models.huggingface import ROWS, to_config
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
def _llama_rounds_nowhere(monkeypatch):
    # Their norms and rotary tables are cast to fp32, which alone makes differences of 1e-7.
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "torch", TorchInFp64())


def randomised(model):
    """fp64, every parameter random: a swapped bias or a forgotten gain must show."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
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
}


def logits_of(model, tokens):
    with torch.no_grad():
        return model.logits(model(tokens))


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
    theirs.load_state_dict(ours.to_hf_state_dict(), strict=True)
    torch.testing.assert_close(theirs(tokens).logits, logits_of(ours, tokens), **TOLERANCE)


def test_fp32_parity():
    theirs, ours, tokens = hf_gpt2().float(), build("gpt2", torch.float32), tokens_of(length=40)
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
    ("make", "type_", "base"), [(hf_gpt2, "gpt2", "transformer"), (hf_llama, "vanilla", "model")]
)
def test_a_base_model_file_loads_too(make, type_, base):
    theirs, ours, tokens = make(), build(type_), tokens_of(length=40)
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
    whole = transformers.AutoConfig.for_model(model_type).to_dict()
    assert ROWS[model_type].read(whole, "") == ROWS[model_type].read({}, "")


@pytest.mark.parametrize(
    ("type_", "fields"), [("gpt2", {}), ("vanilla", {"n_kv_heads": 2, "rope_theta": 500.0})]
)
def test_their_model_of_our_config_has_our_shapes(type_, fields):
    ours = build(type_, torch.float32, **fields)
    config = transformers.AutoConfig.for_model(**to_config(type_, ours.cfg, bos_token_id=0, eos_token_id=0))
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(ours.to_hf_state_dict(), strict=True)
    tokens = tokens_of(length=40)
    torch.testing.assert_close(theirs.eval()(tokens).logits, logits_of(ours, tokens), rtol=0, atol=1e-5)
