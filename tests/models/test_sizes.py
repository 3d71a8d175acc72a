"""Every architecture of next tokens at every size: it can be composed and built, and its parameters and operations are
those of the closed forms, at full size also of numbers worked out by hand."""

import pytest

from adapters import build_adapter
from configs import compose
from configs.files import options
from data.tokenizers import ByteTokenizer
from models.layers.roles import parameters_by_role

VOCABULARY, ROWS = 50257, 50304  # ROWS: as it is stored
VARIANTS = {
    "gpt2": ["model=gpt2"],
    "vanilla": ["model=vanilla"],
    "ngpt": ["model=ngpt"],
    "moe-mixtral": ["model=moe"],
    "moe-deepseek": ["model=moe", "model_cfg.gate_type=deepseek_v3"],
    "mtp": ["model=mtp"],
    "mtp-deepseek": ["model=mtp", "model_cfg.use_deepseek_mtp=true"],
    "mtm-vanilla": ["model=mtm"],
    "mtm-gpt2": ["model=mtm", "model_cfg.trunk=gpt2"],
    "mtm-mixtral": ["model=mtm", "model_cfg.trunk=moe"],
    "mtm-deepseek": ["model=mtm", "model_cfg.trunk=moe", "+model_cfg.trunk_cfg.gate_type=deepseek_v3"],
}


def built(variant, preset, *more):
    """(adapter without storage, model_cfg)"""
    words = [*VARIANTS[variant], f"preset={preset}", f"model_cfg.vocab_size={VOCABULARY}", *more]
    cfg, model_cfg = compose(words, notify=lambda text: None)
    return build_adapter(cfg, model_cfg, ByteTokenizer(), device="meta"), model_cfg


def blocks(d):
    """{kind of block: (all of its parameters, those that act on a token)} at a width; the control's layer is f wide."""
    f, attention, norms = 64 * -(-8 * d // (3 * 64)), 4 * d * d, 2 * d

    def experts(number, chosen, shared):
        one = 3 * d * 8 * -(-f // (8 * (chosen + shared)))
        common = attention + norms + d * number + shared * one
        return common + number * one, common + chosen * one

    dense, gpt2 = attention + 3 * d * f + norms, 12 * d * d + 13 * d
    return {
        "gpt2": (gpt2, gpt2),
        "vanilla": (dense, dense),
        # Two learned rates of d, and scales of d, f and f.
        "ngpt": (attention + 3 * d * f + 3 * d + 2 * f,) * 2,
        "mixtral": experts(8, 2, 0),
        "deepseek": experts(32, 7, 1),
    }


def expected_parameters(variant, d, layers, n_ctx):
    """[total, active] of the shipped files."""
    kind = {"moe": "", "mtm": "", "mtp": "vanilla"}.get(variant.partition("-")[0], variant)
    kind = kind or variant.partition("-")[2]
    norm = 2 * d if kind == "gpt2" else d
    outside = {"gpt2": (ROWS + n_ctx) * d + norm, "ngpt": 2 * ROWS * d + ROWS}.get(kind, ROWS * d + norm)
    found = []
    for block, dense in zip(blocks(d)[kind], blocks(d)["vanilla"], strict=True):
        stack = dense + (layers - 1) * block if kind == "deepseek" else layers * block
        further = block + 2 * d * d + 3 * norm if variant == "mtp-deepseek" or "mtm" in variant else 0
        found.append(outside + stack + further)
    return found


PRESETS = [pytest.param(p, marks=[] if p == "nano" else pytest.mark.slow) for p in options("preset")]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_at_every_size(variant, preset):
    adapter, model_cfg = built(variant, preset)
    c = model_cfg
    total, active = expected_parameters(variant, c.d_model, c.n_layers, c.n_ctx)
    counts = parameters_by_role(adapter.param_roles(), adapter.named_model_parameters())
    assert sum(counts.values()) == total
    assert (adapter.active_parameters() or total) == active


BLOCK, HEAD, MIX = 7_077_888, 38_633_472, 1_179_648  # 12 d^2; 50,304 d; 2 d^2 of a module, at d = 768
MIXTRAL, DEEPSEEK = 7_084_032, 7_102_464  # with a gate to 8 and 32 experts
# By variant: weights that multiply a token, and layers of attention, of training and of scoring.
FULL = {
    "gpt2": (123_568_128, 12, 123_568_128, 12),
    "vanilla": (123_568_128, 12, 123_568_128, 12),
    "ngpt": (123_568_128, 12, 123_568_128, 12),
    "moe-mixtral": (123_641_856, 12, 123_641_856, 12),
    "moe-deepseek": (123_838_464, 12, 123_838_464, 12),
    "mtp": (162_201_600, 12, 123_568_128 - BLOCK, 11),
    "mtp-deepseek": (170_459_136, 13, 123_568_128, 12),
    "mtm-vanilla": (123_568_128 + BLOCK + MIX + HEAD, 13, 123_568_128, 12),
    "mtm-gpt2": (170_459_136, 13, 123_568_128, 12),
    "mtm-mixtral": (123_641_856 + MIXTRAL + MIX + HEAD, 13, 123_641_856, 12),
    "mtm-deepseek": (123_838_464 + DEEPSEEK + MIX + HEAD, 13, 123_838_464, 12),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_operations_at_full_size(variant):
    """Of rows of 1,024 tokens, each of which sees 512.5 on average."""
    training, layers, scoring, layers_of_scoring = FULL[variant]
    flops = built(variant, "none")[0].flops(1024)
    assert flops.training_per_token == 6 * training + 12 * layers * 512.5 * 768
    assert flops.forward_per_token == 2 * scoring + 4 * layers_of_scoring * 512.5 * 768


def test_parameters_at_full_size():
    def counted(variant):
        adapter, _ = built(variant, "none")
        return sum(p.numel() for p in adapter.parameters()), adapter.active_parameters()

    assert counted("vanilla")[0] == counted("mtp")[0] == 123_587_328
    assert counted("moe-mixtral") == (293_530_368, 123_661_056)
    assert counted("moe-deepseek") == (286_059_264, 123_857_664)


@pytest.mark.parametrize("variant", ["vanilla", "ngpt", "moe-mixtral", "mtp"])
def test_a_head_of_its_own_multiplies_no_more(variant):
    tied, untied = (
        built(variant, "nano", f"model_cfg.tie_embeddings={tied}")[0].flops(256) for tied in ("true", "false")
    )
    assert tied == untied


def test_more_experts_cost_their_gates_alone():
    few, many = (
        built("moe-mixtral", "none", f"model_cfg.num_experts={experts}")[0].flops(1024) for experts in (8, 16)
    )
    assert many.training_per_token - few.training_per_token == 6 * 12 * 768 * 8
