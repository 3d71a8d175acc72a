"""Counts, roles, initialisation and FLOPs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import resolve
from models.layers.decoder import Hidden
from models.layers.flops import mean_keys
from models.layers.init import normal_
from models.layers.roles import Rule, parameters_by_role, rule_for
from naming import load
from tests.models.tiny import VARIANT_NAMES, VARIANTS, build, tokens_of


def on_meta(type_, **fields):
    model_class = load(resolve(type_).model)
    with torch.device("meta"):
        return model_class(model_class.Config(**fields))


PRESET = {"vocab_size": 50304, "n_ctx": 256, "bias": False}
COUNTS = [
    # Released GPT-2 sizes, vocabulary as it is.
    ("gpt2", {"vocab_size": 50257, "pad_vocab": False}, 124_439_808),
    ("gpt2", {"vocab_size": 50257}, 124_439_808 + 47 * 768),
    (
        "gpt2",
        {"vocab_size": 50257, "pad_vocab": False, "n_layers": 24, "d_model": 1024, "n_heads": 16},
        354_823_168,
    ),
    (
        "gpt2",
        {"vocab_size": 50257, "pad_vocab": False, "n_layers": 48, "d_model": 1600, "n_heads": 25},
        1_557_611_200,
    ),
    # The size presets, without biases.
    ("gpt2", {**PRESET, "n_layers": 16, "d_model": 768, "n_heads": 12}, 152_101_632),
    ("gpt2", {**PRESET, "n_layers": 16, "d_model": 768, "n_heads": 12, "tie_embeddings": False}, 190_735_104),
    ("gpt2", {**PRESET, "n_layers": 16, "d_model": 896, "n_heads": 14}, 199_472_000),
    ("gpt2", {**PRESET, "n_layers": 16, "d_model": 1024, "n_heads": 16}, 253_133_824),
    ("vanilla", {"vocab_size": 50257}, 123_587_328),
]


@pytest.mark.parametrize(("type_", "fields", "count"), COUNTS)
def test_parameter_counts(type_, fields, count):
    model = on_meta(type_, **fields)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(parameters_by_role(model.param_roles(), model.named_parameters()).values()) == count


def test_vanilla_feed_forward_width():
    config = load("models.vanilla:VanillaConfig")
    assert config(d_model=768).hidden_width == 2048
    assert config(d_model=100, multiple_of=64).hidden_width == 320  # 8/3 * 100 = 266.7
    assert config(d_model=100, multiple_of=32).hidden_width == 288
    assert config(d_model=96, multiple_of=64, use_swiglu=False).hidden_width == 384
    assert config(d_model=768, ffn_hidden=1000).hidden_width == 1000


GPT2_ROLES = {
    "wte.weight": ("embedding", 1),
    "wpe.weight": ("embedding", 1),
    "lm_head.weight": ("head", 1),
    "h.0.ln_1.weight": ("scalar", 1),
    "h.0.ln_1.bias": ("scalar", 1),
    "h.0.attn.c_attn.weight": ("matrix", 3),
    "h.0.attn.c_attn.bias": ("scalar", 1),
    "h.0.attn.c_proj.weight": ("matrix", 1),
    "h.0.attn.c_proj.bias": ("scalar", 1),
    "h.0.ln_2.weight": ("scalar", 1),
    "h.0.ln_2.bias": ("scalar", 1),
    "h.0.mlp.c_fc.weight": ("matrix", 1),
    "h.0.mlp.c_fc.bias": ("scalar", 1),
    "h.0.mlp.c_proj.weight": ("matrix", 1),
    "h.0.mlp.c_proj.bias": ("scalar", 1),
    "ln_f.weight": ("scalar", 1),
    "ln_f.bias": ("scalar", 1),
}
VANILLA_MATRICES = [
    *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
]
VANILLA_ROLES = {
    "embed_tokens.weight": ("embedding", 1),
    "positions.weight": ("embedding", 1),
    "lm_head.weight": ("head", 1),
    **{name: ("matrix", 1) for name in VANILLA_MATRICES},
    **{name.replace(".weight", ".bias"): ("scalar", 1) for name in VANILLA_MATRICES},
    "layers.0.input_layernorm.weight": ("scalar", 1),
    "layers.0.post_attention_layernorm.weight": ("scalar", 1),
    "layers.0.self_attn.q_norm.weight": ("scalar", 1),
    "layers.0.self_attn.k_norm.weight": ("scalar", 1),
    "norm.weight": ("scalar", 1),
}


@pytest.mark.parametrize(
    ("type_", "fields", "expected"),
    [
        ("gpt2", {"tie_embeddings": False}, GPT2_ROLES),
        (
            "vanilla",
            {"tie_embeddings": False, "bias": True, "qk_norm": True, "use_rope": False},
            VANILLA_ROLES,
        ),
    ],
)
def test_roles_of_all_parameters(type_, fields, expected):
    model = build(type_, n_layers=1, **fields)
    rules = model.param_roles()
    found = {name: rule_for(rules, name) for name, _ in model.named_parameters()}
    assert {name: (rule.role, rule.split) for name, rule in found.items()} == expected


@pytest.mark.parametrize(("type_", "fields"), VARIANTS, ids=VARIANT_NAMES)
def test_every_parameter_matches_a_rule_and_every_rule_of_the_other_roles_a_tensor(type_, fields):
    model = build(type_, **fields)
    counts = parameters_by_role(model.param_roles(), model.named_parameters())
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert ("head" in counts) == (fields.get("tie_embeddings") is False)


def test_rules_refuse_unknown_roles_and_names():
    with pytest.raises(ValueError, match="'matrx' is not one of matrix"):
        Rule("x", "matrx")
    with pytest.raises(ValueError, match="every, split and width"):
        Rule("x", "matrix", split=0)
    with pytest.raises(ValueError, match="rates of role head follow no width"):
        Rule("x", "head", width=32)
    with pytest.raises(ValueError, match="'ab' matches none"):
        rule_for([Rule("a", "matrix")], "ab")  # the whole name must match
    assert rule_for([Rule("a.*", "head"), Rule("ab", "matrix")], "ab").role == "head"


UNTIED = {"tie_embeddings": False}
EXPERTS = {"num_experts": 400, "d_ff_expert": 8}  # as many, for the gate to be large enough to be measured
INITIAL = [
    ("gpt2", {"wpe_init_std": 0.01, **UNTIED}),
    ("vanilla", UNTIED),
    ("moe", {**EXPERTS, **UNTIED}),
    ("moe", {**EXPERTS, "gate_type": "deepseek_v3", "n_layers": 3}),
    ("mtp", {"n_layers": 3}),
    ("mtp", {"head_type": "linear", "isoparam": False}),
    ("mtm", {"n_mtp_modules": 2}),
    ("mtm", {"trunk": "gpt2", "trunk_cfg": {"wpe_init_std": 0.01, **UNTIED}}),
    ("mod", {"pred_hidden": 400, **UNTIED}),  # as wide, for the predictor to be large enough to be measured
]


@pytest.mark.parametrize(
    ("type_", "fields"),
    INITIAL,
    ids=[f"{type_}-{'-'.join(map(str, kw.values()))[:30]}" for type_, kw in INITIAL],
)
def test_initial_scales_and_loss(type_, fields):
    """Of what is large enough to be measured; the residual of a block counts the layers of the stack."""
    sizes = {"vocab_size": 1000, "n_ctx": 512, "d_model": 320, "n_heads": 4, "n_layers": 2}
    model = build(type_, torch.float32, std=None, **{**sizes, **fields})
    residual_std = 0.02 / math.sqrt(2 * model.cfg.n_layers)
    checked = set()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif parameter.numel() >= 1e5:
            residual = name.removesuffix(".weight").endswith(("c_proj", "o_proj", "down_proj"))
            expected = 0.01 if name.endswith("wpe.weight") else residual_std if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.001, name
            checked.add(name)
    assert len(checked) >= 8
    tokens = tokens_of(rows=4, length=65, vocabulary=1000)
    with torch.no_grad():
        hidden = model(tokens[:, :-1])
        logits = model.logits(hidden.states if isinstance(hidden, Hidden) else hidden)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(1000), abs=0.3)


def test_initial_scales_of_recurrent_depth():
    """sqrt(2 / 5D), cut off at 3 of it; what writes to the stream, and the factor of its gate, smaller by the root of
    twice the 132 layers that a token passes at 32 recurrences."""
    model = build(
        "rd", torch.float32, std=None, vocab_size=1000, n_ctx=512, d_model=320, n_layers=8, **UNTIED
    )
    std, checked = math.sqrt(2 / (5 * 320)), set()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float(not name.endswith("bias")))), name
            continue
        small = name.endswith(("o_proj.weight", "down_proj.weight", "up_proj.weight"))
        expected = std / math.sqrt(2 * 132) if small else std
        assert parameter.numel() >= 1e5 and parameter.std().item() == pytest.approx(expected, rel=0.03), name
        assert parameter.abs().max() <= 3 * expected * (1 + 1e-6), name
        checked.add(name.rpartition(".")[0].rpartition(".")[2])
    branches = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert checked == {"embed_tokens", "lm_head", "adapter", *branches}
    tokens = tokens_of(rows=4, length=65, vocabulary=1000)
    with torch.no_grad():
        logits = model.logits(model(tokens[:, :-1], recurrences=2).states)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(1000), abs=0.3)


def test_the_law_of_the_state_that_recurrence_begins_with():
    """N(0, 2 / 5), cut off at 3 standard deviations; in training of each row, position and dim a number of its own."""
    model, std = build("rd", torch.float32, d_model=320, n_layers=3), math.sqrt(2 / 5)
    noise = model.start(torch.empty(4, 128, 320), 0, torch.arange(4))
    assert noise.std().item() == pytest.approx(std, rel=0.03) and noise.abs().max() <= 3 * std
    assert noise.mean().abs() < 0.005 and (noise.abs() < std).float().mean() == pytest.approx(
        0.684, abs=0.005
    )
    assert noise.unique().numel() > 0.99 * noise.numel()
    flat = noise.flatten(1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.02, "rows"
    assert (
        torch.corrcoef(flat.view(4, 128, 320).transpose(0, 1).flatten(1)).fill_diagonal_(0).abs().max() < 0.15
    )


@pytest.mark.parametrize(("type_", "fields"), VARIANTS, ids=VARIANT_NAMES)
def test_a_model_born_on_meta_is_initialised_completely(type_, fields):
    normal = build(type_, torch.float32, std=None, **fields)
    model = on_meta(
        type_, **{"vocab_size": 11, "n_ctx": 64, "d_model": 16, "n_heads": 4, "n_layers": 2}, **fields
    )
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
    model.init_weights(torch.Generator().manual_seed(0))
    assert not list(model.buffers())
    for name, tensor in normal.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    tokens = tokens_of(length=20)
    assert torch.equal(model(tokens), normal(tokens))


def test_the_draw_does_not_depend_on_the_dtype():
    wide, narrow = torch.empty(64, 64), torch.empty(64, 64, dtype=torch.bfloat16)
    normal_(wide, 0.02, torch.Generator().manual_seed(0))
    normal_(narrow, 0.02, torch.Generator().manual_seed(0))
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize(
    ("type_", "fields"),
    [
        ("gpt2", {}),
        ("gpt2", {"tie_embeddings": False, "bias": False}),
        ("vanilla", {}),
        ("vanilla", {"n_kv_heads": 2, "use_swiglu": False}),
    ],
)
def test_flops_formula_against_the_counter(type_, fields):
    """The counter sees whole T x T score matrices; the formula counts causal ones, exactly 4 H h (T - s) less
    per layer and token forward, twice that more backward."""
    length, layers, width = 32, 2, 16
    model = build(type_, torch.float32, vocab_size=128, **fields)
    tokens = tokens_of(rows=2, length=length)
    documents = torch.zeros(2, length, dtype=torch.int32)
    # Only plain products are counted: the counter does not know the fused attention of the CPU.
    with FlopCounterMode(display=False) as forward, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.logits(model(tokens, doc_ids=documents))
    flops = model.flops(length)
    causal_discount = 4 * layers * width * (length - mean_keys(length))
    assert forward.get_total_flops() / tokens.numel() == pytest.approx(
        flops.forward_per_token + causal_discount
    )
    assert flops.training_per_token == 3 * flops.forward_per_token


def test_flops_of_the_full_sizes():
    vanilla, gpt2 = on_meta("vanilla", vocab_size=50257), on_meta("gpt2", vocab_size=50257)
    weights = 12 * (4 * 768**2 + 3 * 768 * 2048) + 50304 * 768
    expected = 6 * weights + 12 * 12 * 512.5 * 768
    assert vanilla.flops(1024).training_per_token == expected
    assert gpt2.flops(1024).training_per_token == expected  # 12 d^2 weights per block in both
    windowed = on_meta("vanilla", vocab_size=50257, sliding_window=128)
    assert windowed.flops(1024).training_per_token == 6 * weights + 12 * 12 * mean_keys(1024, 128) * 768


def test_mean_keys_counts_the_mask():
    for window in (None, 1, 3, 7, 9):
        seen = [min(t + 1, window or 8) for t in range(8)]
        assert mean_keys(8, window) == sum(seen) / 8
