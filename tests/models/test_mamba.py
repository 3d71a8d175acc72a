"""Mamba, both versions: the equations, what it begins as, what it keeps, and what leaves the house."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from configs import compose
from kernels.choose import Kernels
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd
from models import alias
from models.layers.roles import rule_for
from models.mamba import Mamba, MambaConfig
from models.state_space.dual import GatedRMSNorm
from tests.models import reference_mamba
from tests.models.tiny import VOCABULARY, build, tokens_of

DUAL = {"version": 2, "headdim": 8, "d_state": 6, "chunk_size": 4}
VERSIONS = [pytest.param({"d_state": 5}, id="1"), pytest.param(DUAL, id="2")]
VARIANTS = [
    {"d_state": 5},
    {"d_state": 5, "use_bias": True, "use_conv_bias": False, "tie_embeddings": False, "time_step_rank": 3},
    {"d_conv": 1, "expand": 1, "d_intermediate": 12, "norm_eps": 0.1},
    DUAL,
    {**DUAL, "ngroups": 2, "use_bias": True, "tie_embeddings": False},
    {**DUAL, "ngroups": 4, "use_conv_bias": False, "d_intermediate": 12, "headdim": 4, "chunk_size": 64},
]
EXACT = {"rtol": 0, "atol": 1e-10}


def logits_of(model, tokens, **more):
    with torch.no_grad():
        return model.logits(model(tokens, **more))


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_it_computes_what_the_papers_write(fields):
    model, tokens = build("mamba", **fields), tokens_of(rows=1, length=11)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    expected = torch.from_numpy(reference_mamba.logits(model.cfg, weights, tokens[0].numpy()))
    torch.testing.assert_close(logits_of(model, tokens)[0], expected, rtol=1e-9, atol=1e-9)


# -- sizes -------------------------------------------------------------------------------------------------------------


def counted(**fields):
    with torch.device("meta"):
        return Mamba(MambaConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "vocabulary", "total"),
    [
        ({}, 50280, 129_135_360),  # the published 130M
        ({}, 50304, 129_153_792),
        ({"version": 2}, 50288, 128_989_632),
    ],
)
def test_parameters_are_those_of_the_published_models(fields, vocabulary, total):
    model = counted(vocab_size=vocabulary, **fields)
    padding = (len(model.embedding_weight) - vocabulary) * 768
    assert sum(p.numel() for p in model.parameters()) - padding == total
    layer = sum(p.numel() for p in model.layers[0].parameters())
    assert layer == (3_764_552 + 768 if fields else 3_771_648)


@pytest.mark.parametrize("version", [1, 2])
def test_a_preset_has_two_mixers_for_each_layer_of_others(version):
    _, cfg = compose(["model=mamba", "preset=nano", f"model_cfg.version={version}"], notify=lambda text: None)
    assert (cfg.n_layers, cfg.d_model, cfg.version) == (8, 192, version)


def test_other_words_for_it():
    assert alias("mamba2") == ("mamba", {"version": 2})
    assert MambaConfig(time_step_init_scheme="uniform").time_step_init_scheme == "random"


def test_operations_of_the_published_size():
    """By hand: 7.70 million of a mixer, 185 of 24, 77 of the head."""
    flops = counted(vocab_size=50280).flops(1024)
    mixer = 2 * (2 * 768 * 1536 + 1536 * (48 + 32) + 48 * 1536 + 1536 * 768) + 2 * 4 * 1536 + 9 * 1536 * 16
    assert flops.forward_per_token == 24 * mixer + 2 * 768 * 50304
    assert flops.training_per_token == 3 * flops.forward_per_token


def test_operations_of_version_2_are_those_of_its_products():
    """Of whole chunks, counted by torch; the convolution is no product of matrices to it."""
    model = build("mamba", torch.float32, **DUAL, vocab_size=64)
    tokens = tokens_of(rows=2, length=12)
    for mixer in (layer.mixer for layer in model.layers):
        mixer.kernels = Kernels({"causal_conv1d": "reference"})
    said, conv = model.flops(12), 2 * 4 * model.layers[0].mixer.channels * len(model.layers)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(tokens))
    assert counter.get_total_flops() == tokens.numel() * (said.forward_per_token - conv)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens)).sum().backward()
    whole = tokens.numel() * (said.training_per_token - 3 * conv)
    assert counter.get_total_flops() == pytest.approx(whole, rel=0.01)  # some products are made again


def test_operations_of_the_published_size_of_version_2():
    """By hand, at the paper's chunks of 256: 297 million."""
    flops = counted(version=2, vocab_size=50288, chunk_size=256).flops(1024)
    projections = 2 * 768 * (2 * 1536 + 2 * 128 + 24 + 1536)
    chunks = 2 * 256 * (128 + 1536) + 4 * 1536 * 128
    mixer = projections + 2 * 4 * (1536 + 2 * 128) + chunks
    assert flops.forward_per_token == 24 * mixer + 2 * 768 * 50304
    assert round(flops.forward_per_token / 1e6) == 297


# -- fields ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"time_step_min": 0.5}, "time_step_min .0.5. must not exceed .*Nearest: time_step_min=0.1"),
        ({"time_step_floor": 5.0}, "time_step_floor .5.0. must not exceed .*Nearest: time_step_floor=0.1"),
        ({"version": 2, "headdim": 50}, r"\(1536\) must be divisible by .*Nearest: headdim=48"),
        ({"version": 2, "ngroups": 5}, "24 heads .*Nearest: ngroups=4"),
        ({"version": 2, "A_init_range": [4.0, 2.0]}, r"must rise. Nearest: \[2.0, 4.0\]"),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    (problem,) = MambaConfig(**fields).problems(None)
    assert re.search(words, problem), problem


def test_fields_of_the_other_version_are_said_to_be_unread():
    assert MambaConfig().unread().keys() == {"headdim", "ngroups", "chunk_size", "A_init_range"}
    dual = MambaConfig(version=2).unread()
    assert dual.keys() == {"time_step_rank", "time_step_scale", "time_step_init_scheme"}
    assert set(dual.values()) == {"version=2"}


# -- where it begins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VERSIONS)
def test_step_sizes_begin_log_uniform_whatever_else_is_initialised(fields):
    model = build("mamba", std=None, **{**fields, "d_model": 512, "headdim": 1})
    for block in model.layers:
        bias = block.mixer.dt_proj.bias if model.cfg.version == 1 else block.mixer.dt_bias
        dt = F.softplus(bias.detach())
        assert dt.min() >= 1e-3 - 1e-9 and dt.max() <= 0.1 + 1e-9
        logs = dt.log10()
        assert logs.mean() == pytest.approx(-2, abs=0.1) and logs.std() == pytest.approx(
            2 / 12**0.5, abs=0.06
        )


def test_step_sizes_begin_no_smaller_than_the_floor():
    model = build("mamba", std=None, time_step_floor=0.05)
    assert F.softplus(model.layers[0].mixer.dt_proj.bias.detach()).min() == pytest.approx(0.05)


def test_weights_begin_as_the_authors():
    model = build("mamba", std=None, d_model=64, n_layers=4, d_intermediate=64)
    for block in model.layers:
        mixer = block.mixer
        torch.testing.assert_close(
            -mixer.A_log.exp(), -torch.arange(1.0, 17, dtype=torch.float64).expand(128, 16)
        )
        assert mixer.D.eq(1).all() and block.norm.weight.eq(1).all()
        for weight, bound in [
            (mixer.in_proj.weight, 1 / 8),
            (mixer.x_proj.weight, 128**-0.5),
            (mixer.dt_proj.weight, 4**-0.5),
            (mixer.conv1d.weight, 0.5),
            (mixer.conv1d.bias, 0.5),
            (mixer.out_proj.weight, 128**-0.5 / 2),
            (block.mlp.fc1.weight, 1 / 8),
            (block.mlp.fc2.weight, 1 / 8 / 2),
        ]:
            assert 0.9 * bound < weight.abs().max() <= bound
            assert weight.detach().std() == pytest.approx(bound / 3**0.5, rel=0.12)
    assert model.embeddings.weight[:VOCABULARY].detach().std() == pytest.approx(0.02, rel=0.1)


def test_rates_of_decay_of_version_2_begin_between_the_two():
    rates = (
        build("mamba", std=None, version=2, headdim=1, d_model=256, A_init_range=[2.0, 6.0])
        .layers[0]
        .mixer.A_log.detach()
        .exp()
    )
    assert 2 <= rates.min() < 2.2 and 5.8 < rates.max() <= 6 and rates.mean() == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("fields", VERSIONS)
def test_rates_and_step_sizes_neither_decay_nor_are_orthogonalised(fields):
    model = build("mamba", **fields, d_intermediate=8)
    rules = model.param_roles()
    vectors = ("A_log", ".D", "bias", "conv1d.weight", "norm.weight", "norm2.weight", "norm_f.weight")
    for name, _ in model.named_parameters():
        rule = rule_for(rules, name)
        assert (rule.role == "scalar" and rule.wd_mult == 0) == name.endswith(vectors), name
        assert rule.role in ("scalar", "embedding", "matrix")


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VERSIONS)
@pytest.mark.parametrize("wide", [True, False])
def test_the_residual_stream_is_wide_unless_asked_otherwise(fields, wide):
    model = build("mamba", torch.float32, **fields, residual_in_fp32=wide)
    seen = []
    for block in model.layers:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens_of())
    assert seen == [torch.float32 if wide else torch.bfloat16] * len(model.layers)


@pytest.mark.parametrize("fields", VERSIONS)
def test_rates_step_sizes_and_states_are_wide_under_mixed_precision(fields, monkeypatch):
    module = "selective" if fields.get("version", 1) == 1 else "dual"
    op = "selective_scan" if module == "selective" else "ssd"
    where = f"models.state_space.{module}.{op}"
    seen = []
    real = selective_scan if module == "selective" else ssd

    def watched(*args, **options):
        y, last = real(*args, **options)
        rates, skip = args[2], args[5]
        bias = args[7] if module == "selective" else args[6]
        seen.append({t.dtype for t in (rates, skip, bias, last)})
        return y, last

    monkeypatch.setattr(where, watched)
    model = build("mamba", torch.float32, **fields)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens_of())
    assert seen == [{torch.float32}] * len(model.layers)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 2, 3, 8)])
def test_the_gated_norm_is_of_each_group_by_itself(groups, shape):
    source = torch.Generator().manual_seed(0)
    norm = GatedRMSNorm(8, groups, 1e-5).double()
    torch.nn.init.normal_(norm.weight, generator=source)
    y, z = (torch.randn(shape, dtype=torch.float64, generator=source, requires_grad=True) for _ in range(2))
    parts = [
        part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        for part in (y * F.silu(z)).chunk(groups, -1)
    ]
    torch.testing.assert_close(norm(y, z), torch.cat(parts, -1) * norm.weight, **EXACT)
    assert torch.autograd.gradcheck(
        lambda y, z, w: torch.func.functional_call(norm, {"weight": w}, (y, z)), (y, z, norm.weight)
    )


# -- limits ------------------------------------------------------------------------------------------------------------


def test_no_step_leaves_what_goes_past_the_states():
    """Delta -> 0: y = D u, behind the gate."""
    model = build("mamba", d_state=5)
    mixer, x = model.layers[0].mixer, torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.dt_proj.bias.fill_(-30.0)
        mixer.dt_proj.weight.zero_()
        u, z = mixer.in_proj(x).chunk(2, -1)
        u = mixer.convolved(u, None, None)[0]
        expected = mixer.out_proj(mixer.D * u * F.silu(z))
        torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("fields", VERSIONS)
def test_states_that_decay_at_once_remember_nothing(fields):
    """A -> -inf: what a mixer gives depends on the tokens of its convolution alone."""
    mixer = build("mamba", **fields).layers[0].mixer
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    other = x.clone()
    other[:, :2] += 1.0
    with torch.no_grad():
        slow = (mixer(x)[0] - mixer(other)[0]).abs()
        mixer.A_log.fill_(12.0)
        fast = (mixer(x)[0] - mixer(other)[0]).abs()
    assert slow[:, 5:].max() > 1e-6 and fast[:, 5:].max() < 1e-12
    assert fast[:, 2:5].max() > 1e-6


def test_heads_of_one_channel_are_the_selective_scan():
    """Version 2 with P = 1 and a rate that is the same for all states."""
    source = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=source)

    u, delta, into, out, rates, skip, bias = (
        draw(2, 13, 4),
        draw(2, 13, 4),
        draw(2, 13, 3),
        draw(2, 13, 3),
        -draw(4).abs(),
        draw(4),
        draw(4),
    )
    kernels = Kernels()
    first, state = selective_scan(
        u,
        delta,
        rates[:, None].expand(4, 3).contiguous(),
        into,
        out,
        skip,
        None,
        bias,
        None,
        None,
        kernels=kernels,
    )
    second, states = ssd(
        u[..., None],
        delta,
        rates,
        into[:, :, None],
        out[:, :, None],
        skip,
        bias,
        None,
        None,
        chunk=5,
        kernels=kernels,
    )
    torch.testing.assert_close(second[..., 0], first, **EXACT)
    torch.testing.assert_close(states[:, :, 0], state, **EXACT)


# -- text: what came before, documents ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VERSIONS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 9), (7, 5), (11, 1), (3, 1, 8)])
def test_pieces_through_states_are_the_whole(fields, sizes):
    model, tokens = build("mamba", **fields), tokens_of(length=sum(sizes))
    cache, found = model.init_cache(2), []
    for piece in tokens.split(sizes, dim=1):
        found.append(logits_of(model, piece, cache=cache))
    torch.testing.assert_close(torch.cat(found, 1), logits_of(model, tokens), **EXACT)
    assert cache.length == sum(sizes)


@pytest.mark.parametrize("fields", VERSIONS)
def test_what_is_kept_is_of_one_size_and_rows_go_alone(fields):
    model, tokens = build("mamba", **fields), tokens_of(rows=3, length=12)
    cache = model.init_cache(3)
    shapes = {name: part.shape for name, part in cache.parts.items()}
    logits_of(model, tokens[:, :9], cache=cache)
    assert {name: part.shape for name, part in cache.parts.items()} == shapes
    cache.select(torch.tensor([2, 0]))
    torch.testing.assert_close(
        logits_of(model, tokens[[2, 0], 9:], cache=cache), logits_of(model, tokens[[2, 0]])[:, 9:], **EXACT
    )


LENGTHS = (5, 1, 9, 2, 4, 1)  # documents within chunks, over their edges, shorter than the convolution


@pytest.mark.parametrize("fields", VERSIONS)
def test_documents_in_a_row_are_as_by_themselves(fields):
    """Logits and gradients."""
    tokens = tokens_of(rows=1, length=sum(LENGTHS))
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    gradients = []
    for packed in (True, False):
        model = build("mamba", **fields)
        for block in model.layers:  # slow decay: what leaks must show
            block.mixer.A_log.data.sub_(3.0)
        pieces = [(tokens, ids)] if packed else [(piece, None) for piece in tokens.split(LENGTHS, 1)]
        out = torch.cat([model.logits(model(piece, doc_ids=of)) for piece, of in pieces], 1)
        out.square().mean().backward()
        gradients.append((out.detach(), *(p.grad for p in model.parameters())))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fields", VERSIONS)
def test_no_bit_of_a_document_depends_on_the_one_before(fields):
    model, tokens = build("mamba", **fields), tokens_of(rows=1, length=12)
    ids = torch.tensor([[0] * 6 + [1] * 6])
    other = tokens.clone()
    other[0, 5] = (other[0, 5] + 1) % VOCABULARY
    before, after = logits_of(model, tokens, doc_ids=ids), logits_of(model, other, doc_ids=ids)
    assert torch.equal(before[:, 6:], after[:, 6:]) and not torch.equal(before[:, 5], after[:, 5])
    assert not torch.equal(logits_of(model, tokens)[:, 6:], before[:, 6:]), "one document is another thing"


@pytest.mark.parametrize("fields", VERSIONS)
def test_no_bit_depends_on_what_follows(fields):
    model, tokens = build("mamba", **fields), tokens_of(length=14)
    for t in (0, 3, 4, 8, 12):
        other = tokens.clone()
        other[:, t + 1 :] = (other[:, t + 1 :] + 1) % VOCABULARY
        assert torch.equal(logits_of(model, tokens)[:, : t + 1], logits_of(model, other)[:, : t + 1])


@pytest.mark.slow
@pytest.mark.parametrize("fields", VERSIONS)
def test_blocks_compile_as_one_graph(fields):
    model, x = build("mamba", torch.float32, **fields), torch.randn(2, 9, 16)
    block = model.layers[0].train()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = []
    for run in (block, compiled):
        given = x.clone().requires_grad_()
        run(given, None).square().sum().backward()
        found.append((given.grad, *(p.grad.clone() for p in block.parameters())))
        block.zero_grad()
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


# -- files of the authors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VERSIONS)
def test_names_are_those_of_the_authors_and_padding_stays_behind(fields):
    model = build("mamba", **fields)
    state = model.to_state_spaces_state_dict()
    mixer = {
        1: "in_proj.weight x_proj.weight out_proj.weight conv1d.weight conv1d.bias dt_proj.weight dt_proj.bias A_log D",
        2: "in_proj.weight conv1d.weight conv1d.bias dt_bias A_log D norm.weight out_proj.weight",
    }[model.cfg.version]
    assert state.keys() == {
        *("backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"),
        *(f"backbone.layers.{i}.mixer.{name}" for i in range(2) for name in mixer.split()),
        *(f"backbone.layers.{i}.norm.weight" for i in range(2)),
    }
    assert len(state["backbone.embedding.weight"]) == VOCABULARY
    padded = dict(state)
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        padded[name] = F.pad(state[name], (0, 0, 0, 5), value=7.0)  # as theirs, up to a multiple of 16
    other, tokens = build("mamba", seed=5, **fields), tokens_of()
    other.from_state_spaces_state_dict(padded)
    torch.testing.assert_close(logits_of(other, tokens), logits_of(model, tokens), **EXACT)
    assert not other.embedding_weight[VOCABULARY:].any()
