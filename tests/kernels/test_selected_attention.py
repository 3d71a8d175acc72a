"""Selected attention: every way against the definition, and that against attention to what is selected, by hand."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import CPP, TRITON
from kernels.against import deviations, gradients, upstream
from kernels.choose import Call, Kernels
from kernels.device import H100, as_if
from kernels.selected_attention import (
    SPARSE,
    SPEC,
    by_blocks,
    gathered,
    inverted,
    reference,
    selected_attention,
    selected_call,
)
from kernels.spec import Sample
from tests.kernels.interpret import interpreted, poisoned
from tests.kernels.samples import close, drawn, exactly, run_of

WAYS = ("masked", "gathered", "by_blocks")
KERNELS = (TRITON, CPP)
EVERY = ("reference", *WAYS, *KERNELS)


def runnable(name):
    """Where an implementation can be called."""
    return interpreted() if name == TRITON else nullcontext()


def exact_in(name):
    """The widest number format of an implementation, and what is equal in it."""
    return (torch.float32, 1e-5) if name in KERNELS else (torch.float64, 1e-12)


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


@pytest.mark.parametrize("name", ["gathered", "by_blocks"])
def test_in_any_number_of_queries_at_a_time(name, monkeypatch):
    monkeypatch.setitem(gathered.CHUNK_BYTES, "cpu", 3000)
    monkeypatch.setattr(by_blocks, "SCORES_BYTES", 300)
    _, sample = drawn("selected_attention", next(iter(SPEC.small)))
    found = deviations(run_of("selected_attention", name), reference, sample)
    assert max(found.values()) <= SPEC.tolerance["float32"], found


@pytest.mark.parametrize("name", EVERY)
def test_of_all_blocks_it_is_causal_attention(name):
    dtype, atol = exact_in(name)
    _, sample = drawn("selected_attention", "one head", dtype)
    q, k, v = (t.detach() for t in list(sample.tensors.values())[:3])
    starts = torch.arange(0, 9, 3, dtype=torch.int32).expand(1, 9, 1, 3)
    with runnable(name):
        found = selected_attention(q, k, v, starts, block=3, kernels=Kernels({"selected_attention": name}))
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_not_selected_or_lies_behind_changes_nothing(name):
    """Not in a bit; and nothing goes back to it."""
    size = "2 x 37, 4 heads in 2 groups, documents"
    _, sample = drawn("selected_attention", size, exact_in(name)[0])
    run, t = run_of("selected_attention", name), sample.tensors
    query = 20
    seen = torch.zeros(37, dtype=torch.bool)
    for start in t["starts"][0, query, 1].tolist():
        seen[start : min(start + 4, query + 1)] |= start >= 0
    assert 0 < seen.sum() < query + 1
    with runnable(name):
        before = run(**t, **sample.options)[0, query, 2:]
        gradients = torch.autograd.grad(before.sum(), (t["k"], t["v"]))
    for grad in gradients:
        assert not grad[0, ~seen].any() and not grad[0, :, 0].any() and grad[0, seen, 1].any()
    changed = {name: t[name].detach().clone() for name in ("k", "v")}
    for other in changed.values():
        other[0, ~seen] += 3
    with runnable(name):
        after = run(**{**t, **changed}, **sample.options)[0, query, 2:]
    assert torch.equal(after, before)


def both(name, sample):
    """Output and gradients."""
    with runnable(name):
        (o,) = sample.call(run_of("selected_attention", name))
        return o, *torch.autograd.grad(o.square().sum(), list(sample.differentiable.values()))


@pytest.mark.parametrize("name", [*WAYS, CPP])
def test_twice_the_same_is_the_same(name):
    _, sample = drawn("selected_attention", next(iter(SPEC.small)))
    for first, second in zip(both(name, sample), both(name, sample), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("lengths", [[5, 33, 1, 40]])
def test_documents_side_by_side_are_as_by_themselves(name, lengths):
    """Blocks counted from the start of each, 16 tokens long: more blocks than the row has room for. Not a bit of the
    second depends on the last token of the first."""
    dtype, atol = exact_in(name)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, sum(lengths), heads, 4, dtype=dtype, generator=generator) for heads in (2, 1, 1)
    )
    run = run_of("selected_attention", name)

    def lists(length):
        own = torch.arange(length) // 16
        found = torch.stack((torch.zeros_like(own), own - 1, own), -1) * 16
        found[own < 2, 1] = -1
        found[own < 1, 0] = -1
        return found.to(torch.int32)[None, :, None]

    def attended(q, k, v, starts):
        positions = torch.arange(q.shape[1])[None]
        with runnable(name):
            return run(q, k, v, starts, positions, block=16, scale=0.5)

    first = [sum(lengths[:i]) for i in range(len(lengths))]
    starts = torch.cat([lists(n) + at * (lists(n) >= 0) for n, at in zip(lengths, first, strict=True)], 1)
    together = attended(q, k, v, starts.to(torch.int32))
    for at, n in zip(first, lengths, strict=True):
        alone = attended(*(t[:, at : at + n] for t in (q, k, v)), lists(n))
        torch.testing.assert_close(together[:, at : at + n], alone, rtol=0, atol=atol)
    for t in (k, v):
        t[:, lengths[0] - 1] += 3
    assert torch.equal(attended(q, k, v, starts.to(torch.int32))[:, lengths[0] :], together[:, lengths[0] :])


@pytest.mark.parametrize("name", [*WAYS, *KERNELS])
def test_scores_far_below_zero(name):
    """Of what is no key, a score is not 0: beside -120 its share would be infinite."""
    dtype, _ = exact_in(name)
    q = torch.full((1, 9, 2, 4), 7.746, dtype=dtype) + 0.1 * torch.arange(9, dtype=dtype)[:, None, None]
    k = (-q[:, :, :1]).contiguous()
    starts = torch.tensor([0, 4, 8]).repeat(9, 1)
    starts[torch.arange(9)[:, None] < starts] = -1
    sample = Sample(
        {
            "q": q.requires_grad_(),
            "k": k.requires_grad_(),
            "v": torch.randn(1, 9, 1, 4, dtype=dtype, requires_grad=True),
            "starts": starts.to(torch.int32)[None, :, None],
            "positions": torch.arange(9)[None],
        },
        {"block": 4, "scale": 0.5},
    )
    exact, expected = exactly("selected_attention", sample)
    with runnable(name), poisoned():
        found = sample.call(run_of("selected_attention", name))
        dy = upstream(found)
        grads = gradients(found, sample, dy)
    close(found[0], expected[0], 1e-5, "output")
    for what, wanted in gradients(expected, exact, [g.double() for g in dy]).items():
        close(grads[what], wanted, 1e-4, what)  # of sums of numbers that cancel


@pytest.mark.parametrize("size", SPEC.small)
def test_in_any_number_of_slices(size, monkeypatch):
    """Each knows the keys up to its own last query, and adds to the gradients of these."""
    monkeypatch.setattr("kernels.selected_attention.cpp.SLICE", 5)
    _, sample = drawn("selected_attention", size)
    found = deviations(run_of("selected_attention", CPP), reference, sample)
    assert max(found.values()) <= SPEC.tolerance["float32"], found


@pytest.mark.parametrize("name", EVERY)
def test_queries_stand_anywhere(name):
    """Also the last one before the others; and the gradient from above has any strides."""
    dtype, atol = exact_in(name)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, 1, 4, dtype=dtype, generator=generator, requires_grad=True) for n in (3, 50, 50)
    )
    starts = torch.tensor([40, 8, 0], dtype=torch.int32).view(1, 3, 1, 1)
    positions = torch.tensor([[44, 9, 3]])
    with runnable(name):
        found = run_of("selected_attention", name)(q, k, v, starts, positions, block=8, scale=0.5)
        grads = torch.autograd.grad(found.sum(), (q, k, v))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = reference(*exact, starts, positions, block=8, scale=0.5)
    wanted = torch.autograd.grad(expected.sum(), exact)
    for a, b in zip((found, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("name", EVERY)
def test_lists_without_a_place(name):
    q = torch.ones(1, 3, 2, 4)
    starts = torch.empty(1, 3, 1, 0, dtype=torch.int32)
    with runnable(name):
        run = run_of("selected_attention", name)
        found = run(q, q[:, :, :1], q[:, :, :1], starts, torch.arange(3)[None], block=4, scale=0.5)
    assert found.shape == q.shape and not found.any()


def test_some_lists_at_a_time_give_the_same(monkeypatch):
    from kernels.selected_attention import triton

    _, sample = drawn("selected_attention", "one query behind others")
    at_once = both(TRITON, sample)
    monkeypatch.setattr(triton, "SHARES_BYTES", 1)
    for first, second in zip(at_once, both(TRITON, sample), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("longest", [2, 256])
@pytest.mark.parametrize(("block", "every"), [(4, 5), (4, 1), (40, 7)])
def test_lists_turned_round(block, every, longest):
    """Each token is in segments with all pairs whose block it is in, each pair once; also where blocks begin at every
    token, and there are too many of them for tiles of their own."""
    keys, generator = 37, torch.Generator().manual_seed(0)
    starts = torch.randint(-1, keys // every, (2, 11, 2, 3), generator=generator)
    starts = torch.where(starts < 0, -1, starts * every).to(torch.int32)
    found = inverted.inverted(starts, keys, block, longest)
    assert int(found.lengths.max()) <= longest and found.begins.diff(dim=1).min() >= 0
    flat = starts.transpose(1, 2).reshape(4, 33)
    for row in range(4):
        in_segments = [[] for _ in range(keys)]
        for begin, first, length in zip(
            *(t[row].tolist() for t in (found.begins, found.firsts, found.lengths)), strict=True
        ):
            for at in range(first, first + length):
                pair, start = int(found.pairs[row, at]) - 33 * row, int(found.starts[row, at])
                assert start == flat[row, pair] >= 0
                for token in range(max(begin, start), min(begin + block, start + block, keys)):
                    in_segments[token].append(pair)
        for token in range(keys):
            touching = (flat[row] >= 0) & (flat[row] <= token) & (token < flat[row] + block)
            assert sorted(in_segments[token]) == touching.nonzero().flatten().tolist()


def test_operations_are_counted():
    size = "16 heads in a group, wider values"
    _, sample = drawn("selected_attention", size)
    # Loaded before: a counter knows what is registered when it is made.
    run = run_of("selected_attention", TRITON)
    with interpreted(), FlopCounterMode(display=False) as counter:
        (o,) = sample.call(run)
        o.sum().backward()
    assert counter.get_total_flops() == sum(SPEC.flops(SPEC.small[size]))


def test_lists_are_turned_round_without_waiting():
    """A tensor without values has no number to wait for."""
    starts = torch.empty(2, 300, 2, 3, dtype=torch.int32, device="meta")
    assert inverted.inverted(starts, 300, 16).begins.shape == (4, 2 * 900 // 256 + 2 * 19)


@pytest.mark.parametrize("name", ["gathered", "by_blocks"])
def test_no_score_of_every_query_and_key(name, monkeypatch):
    """Of 512 queries and keys in one chunk after the other, no tensor is larger than what is fetched."""
    largest = 0
    original = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        found = original(a, b)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setitem(gathered.CHUNK_BYTES, "cpu", 64 * 1024)
    monkeypatch.setattr(by_blocks, "SCORES_BYTES", 64 * 1024)
    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    size = {"rows": 1, "queries": 512, "heads": 2, "groups": 1, "width": 4, "block": 8, "count": 2}
    sample = SPEC.sample(size, torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))
    (o,) = sample.call(run_of("selected_attention", name))
    o.sum().backward()
    assert 0 < largest <= 64 * 1024


@pytest.mark.parametrize(
    ("keys", "selected", "width", "compiler", "name"),
    [
        (256, 64, 32, True, CPP),
        (4_096, 256, 32, True, CPP),
        (4_096, 1_024, 64, True, "by_blocks"),
        (4_096, 4_096, 64, True, CPP),
        (256, 64, 32, False, "masked"),
        (2_048, 1_024, 32, False, "by_blocks"),
    ],
)
def test_what_is_chosen(keys, selected, width, compiler, name, monkeypatch):
    if not compiler:
        monkeypatch.setattr("kernels.cpp.missing", lambda source: "there is none")
    call = Call(torch.device("cpu"), torch.float32, **selected_call(keys, selected, width, width))
    found, why = Kernels().foresee("selected_attention", call)
    assert found == name and ("not cpp: there is none" in why) == (not compiler)


def test_a_call_says_what_it_is():
    kernels = Kernels()
    for keys in (64, 16_384):
        q = torch.ones(1, keys, 1, 32)
        starts = torch.zeros(1, 1, 1, 2, dtype=torch.int32)
        starts[..., 1] = -1
        selected_attention(q[:, -1:], q, q, starts, block=4, kernels=kernels)
    assert list(kernels.used["selected_attention"]) == [CPP, "by_blocks"]


@pytest.mark.parametrize(
    ("dtype", "width", "name", "said"),
    [
        (torch.bfloat16, 256, TRITON, "united in tiles"),
        (torch.bfloat16, 257, "masked", "257 numbers are too wide"),
        (torch.float64, 64, "gathered", "not triton"),
    ],
)
def test_what_is_chosen_on_a_gpu(dtype, width, name, said):
    facts = (SPARSE,) if name == "gathered" else ()
    call = Call(torch.device("cuda"), dtype, columns=width, facts=facts)
    with as_if(H100):
        found, why = Kernels().foresee("selected_attention", call)
    assert found == name and said in why


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
