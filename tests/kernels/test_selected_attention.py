"""Selected attention: every way against the definition, and that against attention to what is selected, by hand."""

from __future__ import annotations

import pytest
import torch

from kernels.against import deviations
from kernels.choose import Kernels
from kernels.selected_attention import SPEC, gathered, reference, selected_attention
from tests.kernels.samples import drawn, run_of

WAYS = ("masked", "gathered")
EVERY = ("reference", *WAYS)


def one_by_one(q, k, v, starts, positions, block, scale):
    """Each query and head by itself, tokens of its blocks picked by hand."""
    o = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    share = q.shape[2] // k.shape[2]
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        tokens = [
            s
            for start in starts[b, t, h // share].tolist()
            if start >= 0
            for s in range(start, start + block)
            if s <= positions[b, t]
        ]
        if tokens:
            keys, values = k[b, tokens, h // share], v[b, tokens, h // share]
            o[b, t, h] = (scale * keys @ q[b, t, h]).softmax(0) @ values
    return o


@pytest.mark.parametrize("size", SPEC.small)
def test_the_definition_is_attention_to_what_is_selected(size):
    _, sample = drawn("selected_attention", size, torch.float64)
    (found,) = sample.call(reference)
    torch.testing.assert_close(found, one_by_one(**sample.tensors, **sample.options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("size", SPEC.small)
@pytest.mark.parametrize("name", WAYS)
def test_every_way_gives_what_the_definition_does(name, size, dtype):
    spec, sample = drawn("selected_attention", size, getattr(torch, dtype))
    found = deviations(run_of("selected_attention", name), reference, sample)
    assert max(found.values()) <= spec.tolerance.get(dtype, 1e-12), found


@pytest.mark.parametrize("name", WAYS)
def test_in_any_number_of_queries_at_a_time(name, monkeypatch):
    monkeypatch.setitem(gathered.CHUNK_BYTES, "cpu", 3000)
    _, sample = drawn("selected_attention", next(iter(SPEC.small)))
    found = deviations(run_of("selected_attention", name), reference, sample)
    assert max(found.values()) <= SPEC.tolerance["float32"], found


@pytest.mark.parametrize("name", EVERY)
def test_of_all_blocks_it_is_causal_attention(name):
    _, sample = drawn("selected_attention", "one head", torch.float64)
    q, k, v = (t.detach() for t in list(sample.tensors.values())[:3])
    starts = torch.arange(0, 9, 3, dtype=torch.int32).expand(1, 9, 1, 3)
    found = selected_attention(q, k, v, starts, block=3, kernels=Kernels({"selected_attention": name}))
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_not_selected_or_lies_behind_changes_nothing(name):
    """Not in a bit; and nothing goes back to it."""
    size = "2 x 37, 4 heads in 2 groups, documents"
    _, sample = drawn("selected_attention", size, torch.float64)
    run, t = run_of("selected_attention", name), sample.tensors
    query = 20
    seen = torch.zeros(37, dtype=torch.bool)
    for start in t["starts"][0, query, 1].tolist():
        seen[start : min(start + 4, query + 1)] |= start >= 0
    assert 0 < seen.sum() < query + 1
    before = run(**t, **sample.options)[0, query, 2:]
    gradients = torch.autograd.grad(before.sum(), (t["k"], t["v"]))
    for grad in gradients:
        assert not grad[0, ~seen].any() and not grad[0, :, 0].any() and grad[0, seen, 1].any()
    changed = {name: t[name].detach().clone() for name in ("k", "v")}
    for other in changed.values():
        other[0, ~seen] += 3
    after = run(**{**t, **changed}, **sample.options)[0, query, 2:]
    assert torch.equal(after, before)


@pytest.mark.parametrize("name", WAYS)
def test_twice_the_same_is_the_same(name):
    _, sample = drawn("selected_attention", next(iter(SPEC.small)))
    run = run_of("selected_attention", name)

    def both():
        (o,) = sample.call(run)
        return o, *torch.autograd.grad(o.square().sum(), list(sample.differentiable.values()))

    for first, second in zip(both(), both(), strict=True):
        assert torch.equal(first, second)


def test_no_score_of_every_query_and_key(monkeypatch):
    """Of 512 queries and keys in one chunk after the other, no tensor is larger than what is fetched."""
    largest = 0
    original = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        found = original(a, b)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setitem(gathered.CHUNK_BYTES, "cpu", 64 * 1024)
    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    size = {"rows": 1, "queries": 512, "heads": 2, "groups": 1, "width": 4, "block": 8, "count": 2}
    sample = SPEC.sample(size, torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))
    (o,) = sample.call(run_of("selected_attention", "gathered"))
    o.sum().backward()
    assert 0 < largest <= 64 * 1024


def test_what_is_chosen():
    kernels = Kernels()
    for keys in (64, 2_048):
        q = torch.ones(1, keys, 2, 4)
        starts = torch.zeros(1, keys, 1, 2, dtype=torch.int32)
        starts[..., 1] = -1
        selected_attention(q, q[:, :, :1], q[:, :, :1], starts, block=4, kernels=kernels)
    assert list(kernels.used["selected_attention"]) == ["masked", "gathered"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"q": torch.ones(1, 5, 3, 4)}, "a divisor of H"),
        ({"k": torch.ones(1, 4, 2, 4)}, "T <= S"),
        ({"starts": torch.zeros(1, 5, 2, 1, dtype=torch.int64)}, "int32"),
        ({"block": 0}, "at least 1"),
    ],
)
def test_shapes_that_do_not_fit(changed, said):
    given = {"q": torch.ones(1, 5, 4, 4), "k": torch.ones(1, 5, 2, 4), "v": torch.ones(1, 5, 2, 4)}
    given |= {"starts": torch.zeros(1, 5, 2, 1, dtype=torch.int32), "block": 4}
    with pytest.raises(ValueError, match=said):
        selected_attention(**{**given, **changed}, kernels=Kernels())
