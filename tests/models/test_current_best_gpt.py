"""current_best_gpt: each trick, alone and with the others, is what its equation says."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from adapters import build_adapter
from configs import compose
from configs.files import options
from data.tokenizers import ByteTokenizer
from models.current_best.config import CurrentBestConfig
from models.current_best.embeddings import previous
from models.current_best.layout import Layout, Stretch
from models.current_best.stages import prefix_weight, rotation_of, shares, stage_at, target_weights
from models.current_best_gpt import CurrentBestGPT
from models.layers.roles import parameters_by_role
from tests.contract.tiny import adapter_of
from tests.models.reference_current_best_gpt import current_best_logits
from tests.models.tiny import tokens_of

VOCABULARY = 37
LENGTH = 6
DOCUMENTS = [[0, 0, 1, 1, 1, 1], [5, 6, 6, 6, 6, 6]]
SIZES = {"vocab_size": VOCABULARY, "n_ctx": 64, "d_model": 16, "n_heads": 2, "window_unit": 1, "dc_window": 3}


def model_of(dtype=torch.float64, std=0.3, **fields):
    """Weights away from their start; in the first stage of training."""
    model = CurrentBestGPT(CurrentBestGPT.Config(**{**SIZES, **fields})).to(dtype).train()
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters() if std else ():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


# What each layer has at a depth, in plain values: states by boundaries, windows in tokens before the own.
RECORD89 = {
    "depth": 11,
    "skipping": [6],
    "long": [3, 10],
    "paired": [0, 2, 5, 9],
    "xsa": [1, 3, 4, 7],
    "gated": [3, 10],
    "composed": [10],
    "tables": {1: 0, 2: 1, 8: 2, 9: 3, 10: 4},
    "skip": (4, 6),
    "late": (8, [8, 9, 10]),
    "gates_from": 4,
    "mixed": [0, 8],
    "exit": [0, 8, 10, 4],
}
OF_FOUR = {
    "depth": 4,
    "skipping": [],
    "long": [1, 3],
    "paired": [0],
    "xsa": [1, 2],
    "gated": [1, 3],
    "composed": [3],
    "tables": {0: 0, 1: 1, 2: 2, 3: 3},
    "skip": (2, 2),
    "late": (3, [3]),
    "gates_from": 1,
    "mixed": [0],
    "exit": [0, 3, 2],
}
OLD = {
    "depth": 12,
    "skipping": [7],
    "long": [0, 4, 11],
    "paired": [],
    "xsa": [],
    "gated": [],
    "composed": [],
    "tables": {0: 0, 1: 1, 2: 2, 9: 0, 10: 1, 11: 2},
    "skip": None,
    "late": None,
    "gates_from": 4,
}
TRICKS = {
    "width": 16,
    "heads": 2,
    "dc_window": 3,
    "windows": {False: 1, True: 3},
    "pair": True,
    "omega": [1.0, 1 / 1024],
    "scale": 0.4,  # 0.1 sqrt(128 / 8)
    "key_offset": True,
    "mask": True,
    "mudd": True,
    "mudd_gate": True,
    "x0": "gated",
    "unet": False,
    "smear": True,
    "bigrams": True,
    "sign_rows": 64,
    "ve_gate": True,
    "cap": [23.0, 5.0, 7.5],
}
NONE = {
    "mudd": False,
    "mudd_gate": False,
    "key_offset": False,
    "x0": "scalar",
    "unet": True,
    "smear": False,
    "bigrams": False,
    "ve_gate": False,
    "pair": False,
    "scale": 0.48,
    "windows": {False: 2, True: 4},
    "cap": [30.0, 0.0, 30.0],  # 7.5 sqrt(16)
}
# fields -> what they change of the four layers
SWITCHES = {
    "all": ({}, {}),
    "attn_skip_layers": (
        {"attn_skip_layers": [2]},
        {"skipping": [2], "xsa": [1], "tables": {0: 0, 1: 1, 3: 2}},
    ),
    "attn_scale_init": ({"attn_scale_init": 0.7}, {"scale": 0.7}),
    "rope_layout": ({"rope_layout": "half"}, {"pair": False}),
    "rope_style": (
        {"rope_style": "full"},
        {"omega": [1.0, 0.1, 0.01, 0.001], "key_offset": False},
    ),
    "window_pattern": ({"window_pattern": "SLSS"}, {"long": [1]}),
    "dense": ({"window_pattern": "dense"}, {"long": [0, 1, 2, 3], "windows": {True: 99}}),
    "window_schedule": ({"window_schedule": "linear"}, {"windows": {False: 1, True: 1}}),
    "window_unit": ({"window_unit": 2}, {"windows": {False: 2, True: 6}}),
    "key_offset": ({"key_offset": "off"}, {"key_offset": False}),
    "paired_head_layers": ({"paired_head_layers": [1]}, {"paired": [1], "xsa": [2]}),
    "four heads": ({"n_heads": 4}, {"heads": 4, "omega": [1.0], "scale": 0.1 * 32**0.5}),
    "no pairs": ({"paired_head_layers": []}, {"paired": []}),
    "value_embed_layers": ({"value_embed_layers": [1]}, {"tables": {1: 0}}),
    "no values": ({"value_embed_layers": []}, {"tables": {}}),
    "value_embeds": ({"value_embeds": 2}, {"tables": {0: 0, 1: 1, 2: 0, 3: 1}}),
    "ve_gate": ({"ve_gate": False}, {"ve_gate": False}),
    "unet_skips": ({"unet_skips": True}, {"unet": True}),
    "x0 scalar": ({"x0_inject": "scalar"}, {"x0": "scalar"}),
    "x0 off": ({"x0_inject": "off"}, {"x0": "off"}),
    "resid_lambda_init": ({"resid_lambda_init": "off"}, {}),
    "post_lambdas": ({"post_lambdas": False}, {}),
    "skip_link": ({"skip_link": []}, {"skip": None}),
    "late_attn_source": ({"late_attn_source": [0, 2, 3]}, {"late": (1, [2, 3])}),
    "mudd": ({"mudd": False}, {"mudd": False}),
    "mudd_gate": ({"mudd_gate": False}, {"mudd_gate": False}),
    "xsa_layers": ({"xsa_layers": []}, {"xsa": []}),
    "attn_gate_layers": ({"attn_gate_layers": []}, {"gated": []}),
    "dc_layers": ({"dc_layers": []}, {"composed": []}),
    "smear": ({"smear": False}, {"smear": False}),
    "bigram_vocab_size": ({"bigram_vocab_size": 0}, {"bigrams": False}),
    "bigram_dim": ({"bigram_dim": 5}, {}),
    "bigram_sign_rows": ({"bigram_sign_rows": 0}, {"sign_rows": 0}),
    "logit_softcap": ({"logit_softcap": []}, {"cap": []}),
    "mask_shifts_at_docs": ({"mask_shifts_at_docs": False}, {"mask": False}),
}

LISTS = ("paired_head_layers", "value_embed_layers", "xsa_layers", "attn_gate_layers", "dc_layers")
OFF = {
    **dict.fromkeys((*LISTS, "attn_skip_layers", "skip_link", "late_attn_source", "logit_softcap"), []),
    **dict.fromkeys(("post_lambdas", "mudd", "mudd_gate", "smear", "yarn_windows"), False),
    **dict.fromkeys(("key_offset", "x0_inject", "resid_lambda_init"), "off"),
    "rope_style": "full",
    "window_pattern": "dense",
    "bigram_vocab_size": 0,
}
PLAIN = {
    **dict.fromkeys(("paired", "xsa", "gated", "composed", "cap"), []),
    **dict.fromkeys(("skip", "late"), None),
    **dict.fromkeys(("mudd", "mudd_gate", "smear", "key_offset", "bigrams"), False),
    **{
        "long": [0, 1, 2, 3],
        "windows": {True: 99},
        "tables": {},
        "x0": "off",
        "omega": [1.0, 0.1, 0.01, 0.001],
    },
}
SWITCHES["nothing at all"] = (OFF, PLAIN)


def plain(*parts):
    found = dict(TRICKS)
    for part in parts:
        found |= part
    return SimpleNamespace(**found)


def check_against_reference(model, c, tokens, docs):
    p = {name: q.detach().clone().requires_grad_() for name, q in model.named_parameters()}
    doc_ids = torch.tensor(docs, dtype=torch.int32)
    logits = model.logits(model(tokens, doc_ids=doc_ids))
    named = p | dict(model.named_buffers())
    rows = [current_best_logits(named, row, doc, c) for row, doc in zip(tokens.tolist(), docs, strict=True)]
    expected = torch.stack(rows)[..., :VOCABULARY]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    targets = tokens_of(len(docs), tokens.shape[1], seed=2, vocabulary=VOCABULARY).flatten()
    for value in (logits, expected):
        F.cross_entropy(value.flatten(0, 1), targets).backward()
    for name, parameter in model.named_parameters():
        if p[name].grad is None:  # a factor of nothing
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        torch.testing.assert_close(parameter.grad, p[name].grad, rtol=0, atol=1e-7, msg=name)
        assert parameter.grad.any(), f"{name} has no part in the loss"


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_trick_by_itself_at_another_depth(switch):
    fields, changed = SWITCHES[switch]
    model = model_of(n_layers=4, **fields)
    tokens = tokens_of(1, LENGTH, vocabulary=VOCABULARY)
    check_against_reference(model, plain(OF_FOUR, changed), tokens, DOCUMENTS[:1])


def test_record89_as_it_is():
    model = model_of(std=0.1)
    tokens = tokens_of(2, LENGTH, vocabulary=VOCABULARY)
    check_against_reference(model, plain(RECORD89), tokens, DOCUMENTS)


def test_record26_as_it_is():
    model = model_of(record="record26", std=0.1)
    model.set_stage(3)  # windows of 2 and 4
    tokens = tokens_of(2, LENGTH, vocabulary=VOCABULARY)
    check_against_reference(model, plain(NONE, OLD), tokens, DOCUMENTS)


def test_with_everything_off_it_is_a_plain_decoder():
    """Embedding, head, two factors of each attention, matrices of attention and of the other layer: nothing else."""
    model = model_of(n_layers=2, **OFF)
    parts = ("self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "self_attn.lambdas")
    parts += ("mlp.up_proj.weight", "mlp.down_proj.weight")
    expected = {"embed_tokens.weight", "lm_head.weight"}
    assert {n for n, _ in model.named_parameters()} == expected | {
        f"layers.{layer}.{part}" for layer in (0, 1) for part in parts
    }


# -- the layers of a record over another depth --------------------------------------------------------------------


def layout_of(**fields):
    return CurrentBestConfig(**fields).layout


def test_lists_of_records_are_theirs_at_their_depth():
    new, old = layout_of(), layout_of(record="record26")
    assert new == Layout(
        depth=11,
        skipping=(6,),
        long=(3, 10),
        paired=(0, 2, 5, 9),
        xsa=(1, 3, 4, 7),
        gated=(3, 10),
        composed=(10,),
        tables={1: 0, 2: 1, 8: 2, 9: 3, 10: 4},
        skip=(4, 6),
        late=(8, (8, 9, 10)),
        gates_from=4,
        mixed=(0, 8),
        exit_mix=((0, 0.0), (8, -0.5), (10, 0.0), (4, 0.0)),
    )
    assert (old.depth, old.skipping, old.long) == (12, (7,), (0, 4, 11))
    assert old.tables == {0: 0, 1: 1, 2: 2, 9: 0, 10: 1, 11: 2}
    assert not (old.paired or old.xsa or old.gated or old.composed or old.skip or old.late or old.exit_mix)


def test_a_layer_goes_to_the_place_that_its_share_of_the_depth_says():
    """floor(i (L' - 1) / (L - 1) + 1/2), in integers."""
    for depth in (1, 2, 4, 6, 8, 16, 24):
        stretch = Stretch(11, depth)
        assert [stretch(i) for i in range(11)] == [math.floor(i * (depth - 1) / 10 + 0.5) for i in range(11)]
    assert Stretch(11, 4).all([1, 2, 8, 9, 10]) == [0, 1, 2, 3], "each once"


@pytest.mark.parametrize("record", ["record89", "record26"])
@pytest.mark.parametrize("depth", range(1, 25))
def test_at_any_depth_it_runs_and_has_what_it_says(record, depth):
    layout = layout_of(record=record, n_layers=depth)
    assert bool(layout.skipping) == (depth >= 8), "below 8 layers none loses its attention"
    for layers in (layout.paired, layout.xsa, layout.gated, layout.composed, layout.long, layout.tables):
        assert all(layer < depth for layer in layers) and len(set(layers)) == len(layers)
        assert not set(layers) & set(layout.skipping)
    assert not set(layout.paired) & {*layout.xsa, *layout.composed}
    assert layout.skip is None or layout.skip[0] <= layout.skip[1]
    assert layout.late is None or layout.late[0] <= min(layout.late[1])
    assert all(boundary < depth for boundary in layout.mixed)
    if depth in (1, 2, 3, 8):
        model = model_of(torch.float32, std=0.1, record=record, n_layers=depth)
        model(tokens_of(1, 5, vocabulary=VOCABULARY)).sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n != "lm_head.weight")


def test_four_layers_are_what_the_references_list_says():
    layout = layout_of(n_layers=4)
    for name, ours in (("paired", layout.paired), ("xsa", layout.xsa), ("composed", layout.composed)):
        assert list(ours) == OF_FOUR[name]
    assert (list(layout.long), list(layout.gated), layout.tables) == ([1, 3], [1, 3], OF_FOUR["tables"])
    assert layout.exit_mix == ((0, 0.0), (3, -0.5), (2, 0.0)), "c_9 is c_7 here, and is there once"


def test_what_is_not_the_records_depth_is_said_and_what_is_looked_up_apart():
    adapter = adapter_of("current_best_gpt")
    text = "\n".join(adapter.notes)
    assert "the 11 layers of record89 laid over 2" in text and "paired heads 0" in text
    named = dict(adapter.named_model_parameters())
    looked_up = sum(p.numel() for n, p in named.items() if "table" in n)
    counted = dict(adapter.counted_parameters())
    assert set(named) - set(counted) == {"lm_head.weight"}, "with the embedding, once"
    assert adapter.parameter_count == sum(p.numel() for p in counted.values())
    assert f"{looked_up:,} of the parameters are looked up alone" in text
    assert adapter.active_parameters() == sum(p.numel() for p in counted.values()) - looked_up
    apart = adapter_of("current_best_gpt", "model_cfg.tie_until=0.0")
    assert dict(apart.counted_parameters()).keys() == named.keys()


# -- counts, found outside of the code --------------------------------------------------------------------------------


def test_sizes_and_operations_of_the_records():
    """40 d^2 + 88 d^2 + V_p d that multiply and 0.2 M of gates, of 636 M; 193.2 M of values, 289.8 M of pairs."""
    with torch.device("meta"):
        model = CurrentBestGPT(CurrentBestConfig(vocab_size=50257))
        old = CurrentBestGPT(CurrentBestConfig(vocab_size=50257, record="record26"))
    d, rows = 768, 50304
    gates = model.active_parameters() - 128 * d * d - rows * d
    assert 0.15e6 < gates < 0.25e6
    assert sum(p.numel() for p in model.value_tables.parameters()) == 193_167_360
    assert model.bigrams.table.weight.numel() == 289_751_040
    assert 635e6 < sum(p.numel() for p in model.parameters()) < 637e6
    numbers = {
        name: len(part.starts) for name, part in (("pre", model.early_gates), ("post", model.late_gates))
    }
    assert numbers == {"pre": 26, "post": 41}
    assert len(model.layers[10].mix.mudd.starts) == 14 and len(model.exit.starts) == 5
    # 11 layers of attention, 12 of the other kind.
    assert old.active_parameters() - (11 * 4 + 12 * 8) * d * d - rows * d < 100

    flops = model.flops(2048)
    s = [_mean(2048, 769)] * 4 + [_mean(2048, 2048)] * 2 + [_mean(4096, 769)] * 4 + [_mean(2048, 112)]
    weights = flops.forward_per_token - 4 * sum(s) * d
    assert weights == pytest.approx(2 * (128 * d * d + rows * d + gates), rel=1e-4)


def _mean(length, window):
    return sum(min(t + 1, window) for t in range(length)) / length


def test_tables_of_pairs_scale_with_the_vocabulary():
    assert CurrentBestConfig(vocab_size=50257).bigram_rows == 377_280
    small = CurrentBestConfig(vocab_size=1025)
    assert (small.bigram_rows, small.sign_rows) == (8_640, 2_048)
    assert CurrentBestConfig(vocab_size=50257).sign_rows == 8_192


# -- what changes over a run ------------------------------------------------------------------------------------------


def test_scale_and_frequencies_follow_the_long_window():
    cfg = CurrentBestConfig(d_model=768)
    scales = [rotation_of(cfg, stage)[1] for stage in range(4)]
    assert scales == pytest.approx([0.1, 0.11695, 0.12752, 0.13178], abs=5e-6)
    first, last = rotation_of(cfg, 0)[0], rotation_of(cfg, 3)[0]
    assert first == pytest.approx([1024 ** (-i / 31) for i in range(32)])
    assert last[0] == pytest.approx(1.0), "what turns 61 times in the window keeps its pace"
    assert last[-1] == pytest.approx(first[-1] * 3 / 13, rel=1e-6), "what turns less than once is stretched"
    assert rotation_of(CurrentBestConfig(yarn_windows=False), 3) == rotation_of(cfg, 0)


def test_stages_are_those_of_1285_steps():
    cfg = CurrentBestConfig()
    blocks = [cfg.stages[stage_at(cfg.stages, step / 1285)] for step in (0, 423, 424, 846, 847, 1269, 1270)]
    found = [(stage.short, stage.long) for stage in blocks]
    assert found == [(1, 3), (1, 3), (3, 7), (3, 7), (5, 11), (5, 11), (6, 13)]
    assert sum(shares(cfg.stages)) == pytest.approx(1)
    old = CurrentBestConfig(record="record26").stages
    assert [(s.short, s.long) for s in (old[0], old[1], old[13])] == [(1, 1), (1, 2), (7, 14)]
    assert stage_at(old, 0.0) == 0 and stage_at(old, 0.9999) == 13


def test_windows_of_scores_are_the_last_ones_and_no_wider_than_a_context():
    cfg = CurrentBestConfig(n_ctx=4096)
    assert cfg.scoring_windows == (768, 2560)
    assert CurrentBestConfig(n_ctx=1024).scoring_windows == (768, 1024)
    model = model_of(torch.float32, n_layers=4)
    assert model.windows == (2, 4) and model.eval().windows == (7, 21)


@pytest.mark.parametrize(
    ("done", "weights", "prefix"),
    [
        (0.0, [1, 0.5, 0.25], 0.25),
        (1 / 6, [1, 0.5, 0.125], 0.25),
        (1 / 3, [1, 0.5, 0], 0.25),
        (0.5, [1, 0.25, 0], 0.125),
        (2 / 3, [1, 0, 0], 0),
        (0.9, [1, 0, 0], 0),
    ],
)
def test_further_targets_fade_by_thirds(done, weights, prefix):
    assert target_weights([1.0, 0.5, 0.25], done) == pytest.approx(weights, abs=1e-12)
    assert prefix_weight(0.25, done) == pytest.approx(prefix, abs=1e-12)


# -- starts -----------------------------------------------------------------------------------------------------------


def test_gates_begin_where_they_are_said_to():
    """With W_2 = 0, whatever the state: 0 for exclusive attention and x0, 0.25 for heads, 0.05 for pairs, 0.5 for the
    skip, 1 and 0 for composed heads."""
    model = model_of(std=None)
    x = torch.randn(1, 2, 16, dtype=torch.float64)
    starts = {"xsa": 0, "gate": 0.25, "x0": 0, "bigram": 0.05, "skip": 0.5, "read": 1, "write": 0}
    seen = set()
    for gates in (model.early_gates, model.late_gates):
        for kinds in gates(x, model.gate_scale).values():
            for kind, value in kinds.items():
                seen.add(kind)
                torch.testing.assert_close(value, torch.full_like(value, starts[kind]))
    assert seen == starts.keys()
    of = model.layers[10].mix(x)
    root = 1.1**0.5
    expected = {"keep": [root, root], "post": [1, 1], "value": [2, 2], "x0": [0], "bigram": [0.05]}
    for kind, values in expected.items():
        assert [v[0, 0].item() for v in of[kind]] == pytest.approx(values), kind
    assert model.exit(x)[0, 0].tolist() == pytest.approx([0, -0.5, 0, 0, 0])


def test_matrices_begin_uniform_and_what_is_written_out_at_zero():
    model = CurrentBestGPT(CurrentBestConfig(vocab_size=2048, d_model=256, n_heads=2, n_layers=2))
    model.init_weights(torch.Generator().manual_seed(0))
    assert torch.equal(model.embed_tokens.weight, model.lm_head.weight)
    for name, p in model.named_parameters():
        if name.endswith(("qkv_proj.weight", "o_proj.weight", "up_proj.weight")):
            assert float(p.std()) == pytest.approx(0.5 * 256**-0.5, rel=0.03), name
            assert float(p.abs().max()) <= 3**0.5 * 0.5 * 256**-0.5 * 1.0001
        elif name.endswith(("down_proj.weight", "table.weight")):
            assert not p.any()
        elif "value_tables" in name:
            assert float(p.std()) == pytest.approx(0.01, rel=0.03)
    assert float(model.lm_head.weight.std()) == pytest.approx(0.005, rel=0.03)
    assert set(model.bigrams.signs.unique().tolist()) == {-1, 1}


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(4))
def test_windows_of_every_stage_are_masks_of_their_widths(stage):
    """Values and gradients: plans are made anew for another window, and kept from no other."""
    model = model_of(n_layers=2, paired_head_layers=[], std=0.3, window_pattern="SL")
    tokens = tokens_of(1, 30, vocabulary=VOCABULARY)
    for each in (3 - stage, stage):
        model.set_stage(each)
        seen = attended(model, tokens)
        short, long = [(1, 3), (3, 7), (5, 11), (6, 13)][each]
        for layer, window in ((0, short), (1, long)):
            assert (seen[layer] == torch.ones(30, 30).tril().triu(-window)).all(), (each, layer)


def attended(model, tokens):
    """Of each layer, which token's value (S) reaches which output (T)."""
    shared = model._shared(tokens, 0, None, None, previous(tokens, None, None, True))
    z, found = torch.randn(1, 30, 16, dtype=torch.float64), []
    for block in model.layers:
        added = torch.zeros_like(z).requires_grad_()
        y = block.self_attn(z, None, added, {}, shared, None)
        rows = [torch.autograd.grad(y[0, t].sum(), added, retain_graph=True)[0][0] for t in range(30)]
        found.append((torch.stack(rows).abs().sum(-1) > 0).double())
    return found


@pytest.mark.parametrize("record", ["record89", "record26"])
@pytest.mark.parametrize(
    "preset", [pytest.param(p, marks=[] if p == "nano" else pytest.mark.slow) for p in options("preset")]
)
def test_every_size_of_both_records_can_be_built_and_counted(preset, record):
    words = [
        "model=current_best_gpt",
        f"preset={preset}",
        f"model_cfg.record={record}",
        "model_cfg.vocab_size=50257",
    ]
    cfg, c = compose(words, notify=lambda text: None)
    model = build_adapter(cfg, c, ByteTokenizer(), device="meta").model
    d, layers, rows = c.d_model, c.depth, 50304
    attending = layers - (layers >= 8)
    tables = (3 if record == "record26" else {4: 4, 6: 3, 8: 3}.get(layers, 5)) * rows * d
    pairs = 377_280 * d if record == "record89" else 0
    known = attending * 4 * d * d + layers * 8 * d * d + 2 * rows * d + tables + pairs
    rest = sum(p.numel() for p in model.parameters()) - known
    networks = 64 * d * 4  # from x0, from a later layer, in the last and behind it
    assert 0 < rest < 100 if record == "record26" else networks < rest < networks + 64 * 200
    counts = parameters_by_role(model.param_roles(), model.named_parameters())
    assert counts["embedding"] == rows * d + tables + pairs == model.looked_up
    assert counts["matrix"] == attending * 4 * d * d + layers * 8 * d * d
    assert model.flops(256).training_per_token > 6 * (counts["matrix"] + rows * d)


def test_a_short_row_costs_less_than_the_windows_would():
    model = model_of(torch.float32)
    assert model.flops(4).keys < model.flops(64).keys
