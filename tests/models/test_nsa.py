"""Native sparse attention whole: the equations, what each branch becomes at its limits, and what is kept of a text."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from configs.explain import explain
from kernels.selected_attention import selected_attention
from models.layers.recompute import recomputing
from models.layers.roles import rule_for
from models.nsa import NSA, NSAConfig
from models.sparse import mixer
from models.sparse.blocks import capacity
from tests.models import reference_nsa
from tests.models.reference_nsa import turn
from tests.models.tiny import build, tokens_of

SPARSE = {
    **{"n_kv_heads": 2, "head_dim": 4, "sliding_window": 5, "compress_block_size": 4, "compress_stride": 2},
    **{"selection_block_size": 4, "num_selected_blocks": 4, "gate_hidden_dim": 3, "multiple_of": 8},
}
FLA = {
    **{"compression": "mean", "compress_stride": None, "compress_rope": True, "share_branch_kv": True},
    **{"num_init_blocks": 0, "num_local_blocks": 1, "num_selected_blocks": 2, "gate_hidden_dim": 0},
}
VARIANTS = [
    {},
    {
        "n_kv_heads": 1,
        "compress_stride": 1,
        "num_init_blocks": 2,
        "num_local_blocks": 1,
        "tie_embeddings": False,
    },
    {
        "n_kv_heads": 4,
        "v_head_dim": 6,
        "compress_rope": True,
        "selection_block_size": 8,
        "num_selected_blocks": 3,
    },
    {"v_head_dim": 2, "share_branch_kv": True, "compress_block_size": 2, "compress_mlp_ratio": 1},
    FLA,
]
BRANCHES = {"compressed": 0, "selected": 1, "window": 2}


def sparse(**fields):
    return build("nsa", **{**SPARSE, **fields})


def logits_of(model, tokens, **more):
    with torch.no_grad():
        return model.logits(model(tokens, **more))


def attention_of(branch, **fields):
    """A layer of which one branch alone counts, and inputs of it (1, 29, D)."""
    layer = sparse(**fields).layers[0].attn
    with torch.no_grad():
        layer.g_proj.out.weight.zero_()
        bias = torch.full((4, 3), -torch.inf)
        bias[:, BRANCHES[branch]] = torch.inf
        layer.g_proj.out.bias.copy_(bias.flatten())
    return layer, torch.randn(1, 29, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def run(layer, x, doc_ids=None):
    tokens = torch.zeros(x.shape[:2], dtype=torch.int64)
    return layer(x, mixer.layout_of(layer.cfg, tokens, 0, doc_ids, None, x.dtype, layer.kernels))


def dense(layer, x, branch, rotated):
    """Causal attention with the branch's keys and values."""
    c = layer.cfg
    q = layer.q_proj(x).unflatten(-1, (c.n_heads, -1))
    k = layer.k_proj(x).unflatten(-1, (3, c.n_kv_heads, -1))[:, :, BRANCHES[branch]]
    v = layer.v_proj(x).unflatten(-1, (3, c.n_kv_heads, -1))[:, :, BRANCHES[branch]]
    if rotated:
        q, k = (torch.from_numpy(turn(t[0].detach().numpy(), c.rope_theta))[None] for t in (q, k))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return layer.o_proj(o.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_it_computes_what_the_paper_writes(fields):
    model, tokens = sparse(**fields), tokens_of(rows=1, length=29)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    expected = torch.from_numpy(reference_nsa.logits(model.cfg, weights, tokens[0].numpy()))
    torch.testing.assert_close(logits_of(model, tokens)[0], expected, rtol=1e-9, atol=1e-9)


# -- causality, documents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, FLA], ids=["paper", "fla"])
def test_a_later_token_changes_nothing_earlier(fields):
    """Bit for bit, at every place in a block: of a summary that ends behind the query, and of what is selected."""
    model, tokens = sparse(**fields), tokens_of(rows=1, length=29)
    before = logits_of(model, tokens)
    for place in range(29):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        after = logits_of(model, changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])


@pytest.mark.parametrize("lengths", [*([n, 29 - n] for n in range(9, 18)), [2, 1, 14, 3, 9], [28, 1]])
@pytest.mark.parametrize("fields", [{}, FLA, {"compress_rope": True}], ids=["paper", "fla", "turned"])
def test_packed_documents_are_what_they_are_alone(fields, lengths):
    """The second begins at every place in a block."""
    model, tokens = sparse(**fields), tokens_of(rows=1, length=29)
    ids = torch.tensor(np.repeat(np.arange(len(lengths)), lengths))[None]
    offsets = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    packed = logits_of(model, tokens, doc_ids=ids, cu_seqlens=offsets)
    alone = torch.cat([logits_of(model, part) for part in tokens.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)


# -- branches at their limits ------------------------------------------------------------------------------------------


def test_selection_of_all_blocks_is_dense_attention():
    layer, x = attention_of("selected", num_selected_blocks=8)
    torch.testing.assert_close(run(layer, x), dense(layer, x, "selected", rotated=True), rtol=0, atol=1e-10)
    fewer, _ = attention_of("selected", num_selected_blocks=7)
    assert not torch.allclose(run(fewer, x), run(layer, x))


def test_a_window_as_long_as_the_row_is_dense_attention():
    layer, x = attention_of("window", sliding_window=29)
    torch.testing.assert_close(run(layer, x), dense(layer, x, "window", rotated=True), rtol=0, atol=1e-10)
    shorter, _ = attention_of("window", sliding_window=28)
    differs = (run(shorter, x) - run(layer, x)).abs().amax((0, 2)) > 1e-9
    assert differs.nonzero().flatten().tolist() == [28]  # the one token that sees 29


def test_summaries_of_single_tokens_are_dense_attention():
    layer, x = attention_of("compressed", compression="mean", compress_block_size=1, compress_stride=1)
    torch.testing.assert_close(
        run(layer, x), dense(layer, x, "compressed", rotated=False), rtol=0, atol=1e-10
    )


def test_a_query_that_sees_no_summary_is_told_nothing():
    layer, x = attention_of("compressed")
    x.requires_grad_()
    y = run(layer, x)
    assert not y[:, :3].any() and y[:, 3].any() and y.isfinite().all()
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert not run(layer, x[:, :3]).any()  # no block at all


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("fields", [{}, {"compress_block_size": 2, "compress_stride": 2}], ids=str)
def test_every_parameter_has_a_gradient_in_rows_without_summaries(fields, length):
    """A step refuses parameters that it does not use, and processes wait for each other's gradients of all."""
    model = sparse(**fields)
    model(tokens_of(rows=1, length=length)).square().sum().backward()
    without = [name for name, p in model.layers.named_parameters() if p.grad is None]
    assert not without
    assert any(p.grad.any() for p in model.layers.parameters())


@pytest.mark.parametrize("branch", BRANCHES)
def test_gates_let_one_branch_through(branch):
    layer, x = attention_of(branch)
    before = run(layer, x)
    with torch.no_grad():
        for other in {*BRANCHES} - {branch}:
            layer.v_proj.weight.unflatten(0, (3, -1))[BRANCHES[other]].normal_()
    assert torch.equal(run(layer, x), before)
    with torch.no_grad():
        layer.v_proj.weight.unflatten(0, (3, -1))[BRANCHES[branch]].normal_()
    assert not torch.allclose(run(layer, x), before)


def test_nothing_learns_through_a_selection():
    for branch, learns in (("selected", False), ("compressed", True)):
        layer, x = attention_of(branch)
        run(layer, x).square().sum().backward()
        for phi in (layer.compress_k, layer.compress_v):
            assert all(bool(p.grad.any()) == learns for p in phi.parameters())


def test_gradients_in_fp64():
    layer = sparse().layers[0].attn
    x = torch.randn(1, 11, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: run(layer, x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scores_far_below_zero(dtype):
    """Near -120 in every branch, in rows of two blocks and a token: beside them an exponential of what is no key would
    be infinite, and a gradient no number."""
    layer, x = attention_of("window")
    with torch.no_grad():
        layer.g_proj.out.bias.zero_()
        for name, sign in (("q_proj", 1), ("k_proj", -1)):
            weight = getattr(layer, name).weight
            weight.mul_(0.01)[:, 0] = sign * 1.72
        for part in (layer.compress_k.up, layer.compress_k.down):
            part.weight.zero_()
        layer.compress_k.down.bias.fill_(-7.75)
    x = x[:, :9].clone()
    x[..., 0] = 4.5
    layer.to(dtype)
    asked, keys, _ = layer._projected(x.to(dtype))
    for other in (keys[1], torch.full_like(keys[0], -7.75)):
        assert -130 < (asked[0, -1, 0] @ other[0, -1, 0]).item() / 2 < -110
    given = x.to(dtype).requires_grad_()
    y = run(layer, given)
    y.square().sum().backward()
    assert y.isfinite().all() and y.abs().max() > 0
    for name, p in [("x", given), *layer.named_parameters()]:
        assert p.grad is None or p.grad.isfinite().all(), name
    assert given.grad.abs().max() > 0


# -- ranking -----------------------------------------------------------------------------------------------------------


def test_blocks_are_chosen_once_where_activations_are_computed_anew(monkeypatch):
    """Were they chosen again, another choice would meet what the first one left."""
    calls = []
    select = mixer.select

    def counted(scores, *args, **more):
        calls.append(scores)
        return select(-scores if len(calls) > 1 else scores, *args, **more)

    monkeypatch.setattr(mixer, "select", counted)
    block = sparse().layers[0].train()
    tokens, x = torch.zeros(1, 29, dtype=torch.int64), torch.randn(1, 29, 16, dtype=torch.float64)
    layout = mixer.layout_of(block.attn.cfg, tokens, 0, None, None, x.dtype, block.attn.kernels)
    found = []
    for forward in (block.forward, recomputing(block)):
        calls.clear()
        block.zero_grad()
        forward(x, layout).square().sum().backward()
        assert len(calls) == 1
        found.append([p.grad.clone() for p in block.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


def test_some_queries_at_a_time_choose_the_same(monkeypatch):
    layer, x = attention_of("selected")
    whole = run(layer, x)
    monkeypatch.setattr(mixer, "SCORES_AT_ONCE", 4 * 14 * 3)  # three queries
    assert torch.equal(run(layer, x), whole)


def test_ranks_are_in_fp32_whatever_products_are_in(monkeypatch):
    seen, importance = [], mixer.importance
    monkeypatch.setattr(mixer, "importance", lambda p, w: seen.append((p.dtype, w.dtype)) or importance(p, w))
    model = sparse().to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(tokens_of(length=29))
    assert seen and all(pair == (torch.float32, torch.float32) for pair in seen)


# -- what is kept of a text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"v_head_dim": 2, "sliding_window": 1}, FLA], ids=str)
@pytest.mark.parametrize(
    "pieces", [[1] * 29, [3, *[1] * 26], [4, *[1] * 25], [8, 5, 1, 1, 14], [2, 27]], ids=str
)
def test_a_text_in_pieces_is_the_text(fields, pieces):
    """Around every edge of a block: the token that makes a summary whole, and the first of a block to select."""
    model, tokens = sparse(**fields), tokens_of(length=29)
    cache = model.init_cache(2)
    found = torch.cat([logits_of(model, part, cache=cache) for part in tokens.split(pieces, 1)], 1)
    torch.testing.assert_close(found, logits_of(model, tokens), rtol=1e-10, atol=1e-10)
    assert cache.length == 29


def test_tokens_can_be_taken_back_and_rows_dropped():
    model, tokens = sparse(), tokens_of(rows=3, length=29)
    cache = model.init_cache(3)
    logits_of(model, tokens[:, :10], cache=cache)
    before = cache.snapshot()
    for part in tokens[:, 10:].flip(1).split(1, 1):  # other tokens, beyond the next summaries and the window
        logits_of(model, part, cache=cache)
    cache.restore(before)
    cache.select(torch.tensor([2, 0]))
    found = logits_of(model, tokens[[2, 0], 10:], cache=cache)
    torch.testing.assert_close(found, logits_of(model, tokens)[[2, 0], 10:], rtol=1e-10, atol=1e-10)


def test_a_summary_is_made_once_and_in_time():
    """By the pass that brings its last token."""
    model, tokens = sparse(n_layers=1), tokens_of(length=29)
    made = []
    phi = model.layers[0].attn.compress_k
    phi.register_forward_hook(lambda layer, given, out: made.append(out.shape[1]))
    cache = model.init_cache(2)
    for part in tokens.split(1, 1):
        logits_of(model, part, cache=cache)
    assert made == [int(t + 1 >= 4 and (t + 1 - 4) % 2 == 0) for t in range(29)]


def test_a_token_reads_few_others(monkeypatch):
    """Summaries, selected blocks and the window: counted where attention is given them."""
    read = []

    def attend(q, k, v, plan):
        read[-1] += k.shape[2]
        return original(q, k, v, plan)

    def select(q, k, v, starts, **more):
        chosen = starts[0, 0, 0][starts[0, 0, 0] >= 0]
        read[-1] += int((k.shape[1] - chosen).clamp(max=4).sum())
        return selected_attention(q, k, v, starts, **more)

    original = mixer.attention
    monkeypatch.setattr(mixer, "attention", attend)
    monkeypatch.setattr(mixer, "selected_attention", select)
    model = sparse(n_layers=1)
    cache = model.init_cache(2)
    for part in tokens_of(length=29).split(1, 1):
        read.append(0)
        logits_of(model, part, cache=cache)
    for t, count in enumerate(read):
        chosen = 4 * min(3, t // 4) + t % 4 + 1
        assert count == capacity(t + 1, 4, 2) + chosen + min(t + 1, 5) <= capacity(t + 1, 4, 2) + 4 * 4 + 5


# -- sizes -------------------------------------------------------------------------------------------------------------


def counted(**fields):
    with torch.device("meta"):
        return NSA(NSAConfig(**fields))


def test_parameters_of_the_default_size():
    model = counted(vocab_size=50304)
    assert sum(p.numel() for p in model.parameters()) == 125_486_400
    attn, mlp = model.layers[0].attn, model.layers[0].mlp
    parts = {
        "attention": [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj],
        "summaries": [attn.compress_k, attn.compress_v],
        "gates": [attn.g_proj],
        "mlp": [mlp],
    }
    assert {name: sum(p.numel() for m in some for p in m.parameters()) for name, some in parts.items()} == {
        **{"attention": 1_867_776, "summaries": 545_152, "gates": 104_624, "mlp": 4_718_592}
    }


def test_a_long_row_costs_less_than_dense_attention_would():
    """Selected and window keys stop growing with the row, summaries grow by one in 16 tokens."""
    model = counted(vocab_size=50304)
    short, long = model.flops(8192), model.flops(16384)
    dense = 12 * 2 * 16 * 128 * 8192 / 2  # what twice the row adds to dense attention
    assert 0 < long.forward_per_token - short.forward_per_token < 0.2 * dense


# -- fields ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"compress_stride": 12}, r"compress_stride \(12\) must divide .*nearest: 8"),
        ({"compress_block_size": 128}, r"compress_block_size \(128\) must not exceed .*nearest: 64"),
        ({"num_selected_blocks": 2}, "must have room for the first 1 .* last 2 .*nearest: 3"),
        ({"n_kv_heads": 3}, r"n_heads \(16\) must be divisible .*nearest n_kv_heads: [24]"),
        ({"head_dim": 63}, "must be even .*nearest: 64"),
        ({"compression": "mean"}, "compress_stride .16. must be .*nearest: 32"),
        (
            {"selection_block_size": 8, "compress_block_size": 8, "compress_stride": 4},
            r"selection_block_size \(8\) must be at least 16 .*Nearest: 16",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    run = SimpleNamespace(train_seq_len=4096)
    problems = NSAConfig(**fields).problems(run)
    assert len(problems) == 1 and re.search(words, problems[0]), problems


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([0.0, float("nan"), 0.0], "gate_bias_init.1: must be a finite number, got nan"),
        ([0.0], "gate_bias_init: must have at least 3 entries, got 1"),
        ([0.0] * 4, "gate_bias_init: must have at most 3 entries, got 4"),
    ],
)
def test_gates_that_begin_at_no_number_are_explained(given, said):
    with pytest.raises(ValidationError) as error:
        NSAConfig(gate_bias_init=given)
    ((_, message),) = explain(error.value, NSAConfig, {"gate_bias_init": given}, lambda key: "")
    assert message == said


def test_small_blocks_are_for_short_rows():
    small = NSAConfig(selection_block_size=8, compress_block_size=8, compress_stride=4)
    assert not small.problems(SimpleNamespace(train_seq_len=256))


def test_one_is_told_where_nothing_is_sparse():
    (remark,) = NSAConfig().remarks(SimpleNamespace(train_seq_len=1024))
    assert "nothing is sparse in rows of 1,024" in remark
    assert not NSAConfig().remarks(SimpleNamespace(train_seq_len=1025))


@torch.no_grad()
def test_where_it_begins():
    model = sparse(std=None, d_model=256, head_dim=32)
    attn = model.layers[0].attn
    for phi in (attn.compress_k, attn.compress_v):
        assert phi.up.weight.std() == pytest.approx(phi.up.in_features**-0.5, rel=0.05)
        assert phi.down.weight.std() == pytest.approx(phi.down.in_features**-0.5, rel=0.1)
        assert not phi.places.any()
    assert attn.q_proj.weight.std() == pytest.approx(0.02, rel=0.05)
    assert attn.o_proj.weight.std() == pytest.approx(0.02 / (2 * model.cfg.n_layers) ** 0.5, rel=0.05)
    assert (attn.g_proj(torch.randn(1, 3, 256, dtype=torch.float64)) == 0.5).all()


def test_what_steps_and_shrinks_which_parameter():
    model = sparse()
    rules = model.param_roles()
    found = {
        name.split(".", 2)[2]: rule_for(rules, name) for name, _ in model.layers.named_parameters("layers")
    }
    matrices = {name for name, rule in found.items() if rule.role == "matrix"}
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "up", "down")
    assert {name.split(".")[-2] for name in matrices} == {*parts}
    assert all(found[f"attn.{name}_proj.weight"].split == 3 for name in "kv")
    for name, rule in found.items():
        if name.endswith(("norm.weight", "places", "bias")):
            assert (rule.role, rule.wd_mult) == ("scalar", 0.0), name


# -- the public code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [29, 32])
def test_a_layer_of_fla_is_its_plain_version(groups, length):
    layer = sparse(**FLA, n_kv_heads=groups).layers[0].attn
    x = torch.randn(1, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        q, k, v = (f(x)[0].unflatten(-1, (-1, 4)).numpy() for f in (layer.q_proj, layer.k_proj, layer.v_proj))
        gates = layer.g_proj.out(x)[0].unflatten(-1, (4, 3)).sigmoid().numpy()
        q, k = turn(q, 10000.0), turn(k, 10000.0)
        o = reference_nsa.of_fla(q, k, v, *np.moveaxis(gates, -1, 0), block=4, count=2, window=5)
        expected = layer.o_proj(torch.from_numpy(o).flatten(1))
        torch.testing.assert_close(run(layer, x)[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_go_to_fla_and_come_back(tied):
    model, other = (sparse(**FLA, tie_embeddings=tied, seed=seed) for seed in (0, 1))
    tokens, state = tokens_of(length=17), model.to_fla_state_dict()
    names = {name.removeprefix("model.layers.0.attn.") for name in state if ".layers.0.attn." in name}
    assert names == {f"{name}_proj.weight" for name in "qkvgo"}
    assert state["model.embeddings.weight"].shape == state["lm_head.weight"].shape == (11, 16)
    other.from_fla_state_dict(state)
    assert torch.equal(logits_of(other, tokens), logits_of(model, tokens))
    with pytest.raises(ValueError, match="this state dict of fla"):
        other.from_fla_state_dict({**state, "more": tokens})


def test_the_papers_model_has_no_form_there():
    with pytest.raises(
        ValueError, match=r"fla's model needs compression=mean \(not mlp\), share_branch_kv=True"
    ):
        sparse().to_fla_state_dict()
