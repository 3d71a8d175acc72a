"""The attention function on each of its paths, the rotation, and grouped heads."""

import itertools

import pytest
import torch

import models.layers.attention as module
from models.layers.attention import attention, attention_bias
from models.layers.decoder import document_positions
from models.layers.rotary import apply_rotary, rotary_tables
from tests.models.tiny import build, tokens_of


def draw(heads, groups, queries, keys, dtype=torch.float64, rows=2, width=8):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, heads, queries, width), (rows, groups, keys, width), (rows, groups, keys, width)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


def by_definition(q, k, v, bias, softcap=None):
    """Repeat the kv heads, write all scores down, take the softmax."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    scores = scores.masked_fill(future, -torch.inf)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


DOCUMENTS = torch.tensor([[0] * 11 + [1] * 9, [3] * 2 + [4] * 18])


@pytest.mark.parametrize("path", ["fused", "blocked"])
@pytest.mark.parametrize(
    ("groups", "docs", "window", "softcap"),
    list(itertools.product([4, 2, 1], [False, True], [None, 3], [None, 1.5])),
)
def test_both_paths_equal_the_definition(monkeypatch, path, groups, docs, window, softcap):
    if path == "blocked":
        monkeypatch.setattr(module, "QUERY_BLOCK", 8)  # 20 queries: two full blocks and a short one
        call = lambda q, k, v, bias: module._blocked_attention(q, k, v, bias, softcap, 0.0)  # noqa: E731
    else:
        call = lambda q, k, v, bias: attention(q, k, v, bias, softcap=softcap)  # noqa: E731
    q, k, v = draw(4, groups, 20, 20)
    bias = attention_bias(
        20, 20, doc_ids=DOCUMENTS if docs else None, window=window, device=q.device, dtype=q.dtype
    )
    assert (bias is None) == (not docs and window is None)
    got, expected = call(q, k, v, bias), by_definition(q, k, v, bias, softcap)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_queries_behind_a_cache(queries, softcap):
    q, k, v = draw(4, 2, queries, 20)
    bias = attention_bias(queries, 20, device=q.device, dtype=q.dtype)
    assert (bias is None) == (queries == 1)
    got = attention(q, k, v, bias, softcap=softcap)
    torch.testing.assert_close(got, by_definition(q, k, v, None, softcap), rtol=0, atol=1e-12)


def test_window_counts_the_token_itself():
    bias = attention_bias(6, 6, window=2, device=torch.device("cpu"), dtype=torch.float32)
    assert (bias[0, 0] == 0).sum(-1).tolist() == [1, 2, 2, 2, 2, 2]
    assert attention_bias(6, 6, window=6, device=torch.device("cpu"), dtype=torch.float32) is None


def test_bf16_takes_the_blocked_path_on_cpu_and_stays_close():
    q, k, v = draw(4, 2, 300, 300, torch.bfloat16)
    docs = (torch.arange(300) // 70).expand(2, -1)
    bias = attention_bias(300, 300, doc_ids=docs, device=q.device, dtype=q.dtype)
    got = attention(q, k, v, bias)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, module._blocked_attention(q, k, v, bias, None, 0.0))
    exact = by_definition(q.double(), k.double(), v.double(), bias.double())
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=3e-2)


@pytest.mark.parametrize("dropout", [0.5, 1.0])
def test_dropout_acts_on_probabilities(dropout):
    torch.manual_seed(0)
    q, k, _ = draw(2, 2, 64, 64)
    v = torch.eye(64, dtype=torch.float64).expand(2, 2, 64, 64)  # the output is the probabilities
    dropped, kept = attention(q, k, v, None, dropout=dropout), attention(q, k, v, None)
    zero = (dropped == 0) & (kept != 0)
    assert abs(zero.sum() / (kept != 0).sum() - dropout) < 0.03
    if dropout < 1:
        alive = dropped != 0
        torch.testing.assert_close(dropped[alive], kept[alive] / (1 - dropout))


def test_document_positions_restart():
    ids = torch.tensor([[7, 7, 7, 2, 2, 9], [1, 1, 1, 1, 1, 1]], dtype=torch.int32)
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


def test_rotation_is_relative_and_keeps_lengths():
    x = torch.randn(1, 12, 2, 8, dtype=torch.float64)
    y = torch.randn(1, 12, 2, 8, dtype=torch.float64)

    def products(shift):
        tables = rotary_tables(torch.arange(shift, shift + 12), 8, 10000.0, torch.float64)
        a, b = apply_rotary(x, *tables), apply_rotary(y, *tables)
        torch.testing.assert_close(a.norm(dim=-1), x.norm(dim=-1))
        return torch.einsum("bqhd,bkhd->bhqk", a, b)

    torch.testing.assert_close(products(0), products(1000), rtol=0, atol=1e-9)
    assert (products(0) - torch.einsum("bqhd,bkhd->bhqk", x, y)).abs().max() > 0.1


def test_rotation_tables_are_fp32_for_narrow_models():
    cos, sin = rotary_tables(torch.arange(4), 8, 10000.0, torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    assert apply_rotary(torch.randn(1, 4, 2, 8, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16


def test_adding_a_constant_to_all_positions_changes_no_logit(monkeypatch):
    import models.vanilla as vanilla

    model, tokens = build("vanilla", torch.float32), tokens_of(length=40)
    before = model.logits(model(tokens))
    monkeypatch.setattr(
        vanilla, "rotary_tables", lambda positions, *rest: rotary_tables(positions + 500, *rest)
    )
    torch.testing.assert_close(model.logits(model(tokens)), before, rtol=0, atol=1e-4)


def test_grouped_heads_equal_multi_head_with_copied_weights():
    grouped, full = build("vanilla", n_kv_heads=2), build("vanilla", n_kv_heads=4)
    state = grouped.state_dict()
    for name in state:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    tokens = tokens_of(length=20)
    torch.testing.assert_close(full(tokens), grouped(tokens), rtol=0, atol=1e-12)
    same = build("vanilla", n_kv_heads=None)
    assert torch.equal(same(tokens), build("vanilla", n_kv_heads=4)(tokens))
