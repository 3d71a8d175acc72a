"""Every architecture of next tokens at every size: it can be composed and built, and its parameters and operations are
those of the closed forms, at full size also of numbers worked out by hand."""

import functools

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
    "mod": ["model=mod"],
    "mod-every-block": ["model=mod", "model_cfg.every_other=false", "model_cfg.capacity=0.5"],
    "rd": ["model=rd"],
}


@functools.cache
def built(variant, preset, *more):
    """(adapter without storage, model_cfg)"""
    words = [*VARIANTS[variant], f"preset={preset}", f"model_cfg.vocab_size={VOCABULARY}", *more]
    cfg, model_cfg = compose(words, notify=lambda text: None)
    return build_adapter(cfg, model_cfg, ByteTokenizer(), device="meta"), model_cfg


def blocks(d, bias=True):
    """{kind of block: (all of its parameters, those that act on a token)} at a width; the control's layer is f wide.
    `bias`: of the layers and norms of gpt2."""
    f, attention, norms = 64 * -(-8 * d // (3 * 64)), 4 * d * d, 2 * d

    def experts(number, chosen, shared):
        one = 3 * d * 8 * -(-f // (8 * (chosen + shared)))
        common = attention + norms + d * number + shared * one
        return common + number * one, common + chosen * one

    dense, gpt2 = attention + 3 * d * f + norms, 12 * d * d + (13 if bias else 2) * d
    return {
        "gpt2": (gpt2, gpt2),
        "vanilla": (dense, dense),
        # Two learned rates of d, and scales of d, f and f.
        "ngpt": (attention + 3 * d * f + 3 * d + 2 * f,) * 2,
        "mixtral": experts(8, 2, 0),
        "deepseek": experts(32, 7, 1),
    }


def expected_parameters(variant, d, layers, n_ctx, bias):
    """[total, active] of the shipped files."""
    dense, outside = blocks(d)["vanilla"][0], (ROWS + 1) * d
    if (
        variant == "rd"
    ):  # four norms and biases of queries and keys in place of two norms; a matrix from 2 d to d
        return [outside + layers * (dense + 4 * d) + 2 * d * d] * 2
    if variant.startswith(
        "mod"
    ):  # a routed block has a router of d, and a network d -> 128 -> 1; its share is active
        routed, share = (layers // 2, 0.125) if variant == "mod" else (layers, 0.5)
        outside += routed * (d + 128 * d + 128 + 128 + 1)
        return [outside + layers * dense, outside + (layers - routed + share * routed) * dense]
    kind = {"moe": "", "mtm": "", "mtp": "vanilla"}.get(variant.partition("-")[0], variant)
    kind = kind or variant.partition("-")[2]
    norm = 2 * d if kind == "gpt2" and bias else d
    outside = {"gpt2": (ROWS + n_ctx) * d + norm, "ngpt": 2 * ROWS * d + ROWS}.get(kind, ROWS * d + norm)
    found = []
    for block, dense in zip(blocks(d, bias)[kind], blocks(d)["vanilla"], strict=True):
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
    total, active = expected_parameters(variant, c.d_model, c.n_layers, c.n_ctx, getattr(c, "bias", True))
    counts = parameters_by_role(adapter.param_roles(), adapter.named_model_parameters())
    assert sum(counts.values()) == total
    assert (adapter.active_parameters() or total) == round(active)


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


@pytest.mark.parametrize("variant", FULL)
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
    assert counted("rd")[0] == 96_473_856
    # Of every second block a router and a network of 128: 6 (768 + 98,304 + 257).
    assert counted("mod") == (123_587_328 + 595_974, 123_587_328 + 595_974 - 37_166_976)


# -- mixture of depths -------------------------------------------------------------------------------------------------

KEY = 12 * 768  # operations of training on one key more of each token, in a layer of 768


def test_operations_of_a_mixture_of_depths():
    """Of 1,024 tokens 128 pass six of the twelve blocks, and see 64.5 of each other on average. The network that
    foretells them gives its input no gradient."""
    full, routed = 6 * BLOCK + KEY * 512.5, 0.125 * (6 * BLOCK + KEY * 64.5)
    routers = 6 * 768 + 4 * 768 * 128 + 6 * 128
    adapter = built("mod", "none")[0]
    found = adapter.flops(1024).training_per_token
    assert adapter.kept_passes == 6 + 6 * 0.125
    assert found == 6 * (full + routed + routers) + 6 * HEAD
    published = 6 * (full + routed + 6 * (768 + 768 * 128)) + 6 * HEAD
    assert found == pytest.approx(published, rel=3e-3)  # that has a gradient of the input, and no last layer
    assert (found - 6 * HEAD) / (12 * full) == pytest.approx(0.56, abs=0.01), "of the blocks of the control"


@pytest.mark.parametrize(
    ("capacity", "length", "chosen"), [(0.125, 100, 12), (0.29, 100, 29), (0.001, 64, 1)]
)
def test_operations_follow_the_number_that_is_chosen(capacity, length, chosen):
    """The floor, of what was written; at least 1. All blocks are routed, none of which has a key more to see."""
    words = ["model_cfg.every_other=false", f"model_cfg.capacity={capacity}", "model_cfg.router_type=random"]
    found = built("mod", "none", *words)[0].flops(length).training_per_token
    block = 6 * BLOCK + KEY * (chosen + 1) / 2
    assert found == pytest.approx(12 * chosen / length * block + 6 * HEAD)


# -- recurrent depth ---------------------------------------------------------------------------------------------------

SPLITS = {4: (1, 2, 1), 6: (1, 4, 1), 8: (2, 4, 2), 12: (3, 6, 3), 16: (4, 8, 4), "null": (2, 4, 2)}
TURN = 4 * BLOCK + MIX  # weights of one recurrence of four blocks behind their adapter
MATERIALISED = {1: 8, 8: 36, 32: 132}  # layers that a token passes


@pytest.mark.parametrize("layers", SPLITS)
def test_layers_are_split_into_three_parts(layers):
    model = built("rd", "none", f"model_cfg.n_layers={layers}")[0].model
    assert (len(model.prelude), len(model.core), len(model.coda)) == SPLITS[layers]


@pytest.mark.parametrize("recurrences", MATERIALISED)
def test_operations_of_recurrent_depth(recurrences):
    """2 of a weight in each of the recurrences, 4 more in the last eight; keys of every layer that a token passes."""
    model = built("rd", "none")[0].model
    kept, outside = min(8, recurrences), 4 * BLOCK + HEAD
    key = 4 * 768 * 512.5
    forward = 2 * (outside + recurrences * TURN) + key * MATERIALISED[recurrences]
    backward = 4 * (outside + kept * TURN) + 2 * key * (4 + 4 * kept)
    assert model.flops(1024, recurrences).training_per_token == pytest.approx(forward + backward, rel=1e-12)


def test_operations_of_recurrent_depth_are_planned_for_the_mean_of_what_is_drawn():
    """33 recurrences, 7.982 of which have a backward (a million draws by numpy's own generator); scores and text take
    32."""
    adapter = built("rd", "none")[0]
    planned, outside, key = adapter.flops(1024), 4 * BLOCK + HEAD, 4 * 768 * 512.5
    expected = (
        2 * (outside + 33 * TURN) + key * 136 + 4 * (outside + 7.982 * TURN) + 2 * key * (4 + 4 * 7.982)
    )
    assert planned.training_per_token == pytest.approx(expected, rel=1e-4)
    assert planned.forward_per_token == 2 * (outside + 32 * TURN) + key * 132


@pytest.mark.parametrize(("words", "kept"), [((4, 4), 3.410), ((4, 8), 4.661), ((8, 8), 6.622)])
def test_recurrences_with_a_backward_are_as_many_as_draws_have(words, kept):
    """4,000,000 draws by numpy's own generator have so many."""
    law = built("rd", "none", f"model_cfg.mean_recurrence={words[0]}")[1].depth_law
    assert law.expected() == words[0] + 1
    assert law.expected(words[1]) == pytest.approx(kept, abs=2e-3)


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
