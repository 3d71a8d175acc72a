"""Attention: every implementation against the definition, and what is handed to those that need a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_mask
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from data.offsets import document_offsets
from kernels.attention import (
    SPEC,
    Visible,
    attention,
    attention_call,
    chunked,
    flash_attn,
    flex,
    plan_attention,
    reference,
    sdpa,
    training_facts,
    varlen,
)
from kernels.attention.block_diffusion import OnePass
from kernels.attention.plan import Options, Plan
from kernels.choose import Call, Kernels
from kernels.device import A100, H100

CPU, META = torch.device("cpu"), torch.device("meta")
DOCUMENTS = torch.tensor([[0] * 11 + [1] * 9, [3] * 2 + [4] * 18])


def draw(heads, groups, queries, keys, dtype=torch.float64, rows=2, width=8):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, heads, queries, width), (rows, groups, keys, width), (rows, groups, keys, width)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


def square(length=20, rows=2, **what):
    return Visible(rows, length, length, CPU, **what)


def by_definition(q, k, v, allowed, softcap=None):
    """Repeat the kv heads, write all scores down, take the softmax."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


def pair_by_pair(visible):
    """(B, 1, T, S): what `Visible` says, one pair after another."""
    found = torch.zeros(visible.rows, 1, visible.queries, visible.keys, dtype=torch.bool)
    first = visible.keys - visible.queries
    for b, t, s in itertools.product(*map(range, (visible.rows, visible.queries, visible.keys))):
        sees = not visible.causal or s <= t + first
        if visible.window is not None:
            sees = sees and t + first - s < visible.window
        if visible.doc_ids is not None:
            sees = sees and bool(visible.doc_ids[b, t] == visible.doc_ids[b, s])
        found[b, 0, t, s] = sees
    return found


@pytest.mark.parametrize("path", ["reference", "chunked", "sdpa"])
@pytest.mark.parametrize(
    ("groups", "docs", "window", "softcap"),
    list(itertools.product([4, 1], [False, True], [None, 3], [None, 1.5])),
)
def test_all_paths_equal_the_definition(monkeypatch, path, groups, docs, window, softcap):
    monkeypatch.setattr(chunked, "QUERY_BLOCK", 8)  # 20 queries: two full blocks and a short one
    visible = square(doc_ids=DOCUMENTS if docs else None, window=window)
    assert visible.plain == (not docs and window is None)
    q, k, v = draw(4, groups, 20, 20)
    options = {"heads": (4, groups), "width": 8, "dtype": q.dtype, "softcap": softcap}
    kernels = Kernels({"attention": path})
    if path == "sdpa" and softcap:
        with pytest.raises(ValueError, match="kernels.attention=sdpa is not possible here: .* no softcap"):
            plan_attention(visible, kernels=kernels, **options)
        return
    got = attention(q, k, v, plan_attention(visible, kernels=kernels, **options))
    expected = by_definition(q, k, v, pair_by_pair(visible), softcap)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["reference", "chunked", "sdpa"])
@pytest.mark.parametrize("size", SPEC.small)
def test_every_size_of_the_spec(path, size):
    """Block diffusion and both directions too, with a scale of its own."""
    sample = SPEC.sample(SPEC.small[size], CPU, torch.float64, torch.Generator().manual_seed(0))
    sample.options["scale"] = 0.3
    backend = {"reference": reference, "chunked": chunked, "sdpa": sdpa}[path].BACKEND
    q, k, v = (sample.tensors[name] for name in "qkv")
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) * 0.3
    allowed = sample.options["visible"].allowed()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    (got,) = sample.call(backend)
    torch.testing.assert_close(got, scores.softmax(-1) @ v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, None), (None, 4)])
def test_queries_behind_a_cache(queries, softcap, window):
    q, k, v = draw(4, 2, queries, 20)
    visible = Visible(2, queries, 20, CPU, window=window)
    assert visible.plain == (queries == 1 and window is None)
    plan = plan_attention(visible, dtype=q.dtype, heads=(4, 2), width=8, softcap=softcap, kernels=Kernels())
    expected = by_definition(q, k, v, pair_by_pair(visible), softcap)
    torch.testing.assert_close(attention(q, k, v, plan), expected, rtol=0, atol=1e-12)


def test_window_counts_the_token_itself():
    assert square(6, 1, window=2).allowed()[0, 0].sum(-1).tolist() == [1, 2, 2, 2, 2, 2]
    assert square(6, 1, window=6).window is None and square(6, 1, window=6).plain


def test_bf16_takes_blocks_on_a_cpu_and_stays_close():
    q, k, v = draw(4, 2, 300, 300, torch.bfloat16)
    visible = square(300, doc_ids=(torch.arange(300) // 70).expand(2, -1))
    kernels = Kernels()
    plan = plan_attention(visible, dtype=q.dtype, heads=(4, 2), width=8, kernels=kernels)
    got = attention(q, k, v, plan)
    assert got.dtype == torch.bfloat16 and [*kernels.used["attention"]] == ["chunked"]
    exact = by_definition(q.double(), k.double(), v.double(), visible.allowed())
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=3e-2)


@pytest.mark.parametrize("path", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("dropout", [0.5, 1.0])
def test_dropout_acts_on_probabilities(path, dropout):
    torch.manual_seed(0)
    q, k, _ = draw(2, 2, 64, 64)
    v = torch.eye(64, dtype=torch.float64).expand(2, 2, 64, 64)  # the output is the probabilities
    plans = [
        plan_attention(
            square(64), dtype=q.dtype, heads=(2, 2), width=8, dropout=p, kernels=Kernels({"attention": path})
        )
        for p in (dropout, 0.0)
    ]
    dropped, kept = (attention(q, k, v, plan) for plan in plans)
    zero = (dropped == 0) & (kept != 0)
    assert abs(zero.sum() / (kept != 0).sum() - dropout) < 0.03
    if dropout < 1:
        alive = dropped != 0
        torch.testing.assert_close(dropped[alive], kept[alive] / (1 - dropout))


@pytest.mark.parametrize("masked", ["none", "one for all", "each its own"])
def test_more_rows_than_a_call_takes_are_split(monkeypatch, masked):
    """As patches of bytes are, which may be more than a grid of CUDA has rows."""
    q, k, v = draw(2, 2, 3, 5, rows=8)
    seen = torch.rand(
        8 if masked == "each its own" else 1, 1, 3, 5, generator=torch.Generator().manual_seed(1)
    )
    mask = None if masked == "none" else (seen < 0.5) | (torch.arange(5) == 2)
    plan = plan_attention(
        Visible(8, 3, 5, CPU, causal=True, mask=mask),
        dtype=q.dtype,
        heads=(2, 2),
        width=8,
        kernels=Kernels({"attention": "sdpa"}),
    )
    whole = attention(q, k, v, plan)
    gradients = torch.autograd.grad(whole.square().sum(), (q, k, v))
    monkeypatch.setattr(sdpa, "MOST_ROWS", 3)
    parts = attention(q, k, v, plan)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    for one, other in zip(torch.autograd.grad(parts.square().sum(), (q, k, v)), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_layers_of_different_windows_have_a_plan_each():
    """As many descriptions as there are windows, made before the first layer."""
    q, k, v = draw(4, 2, 20, 20)
    kernels = Kernels()
    plans = {
        window: plan_attention(
            square(doc_ids=DOCUMENTS, window=window), dtype=q.dtype, heads=(4, 2), width=8, kernels=kernels
        )
        for window in (2, 7, None)
    }
    for window in (2, None, 7, 2):
        expected = by_definition(q, k, v, pair_by_pair(square(doc_ids=DOCUMENTS, window=window)))
        torch.testing.assert_close(attention(q, k, v, plans[window]), expected, rtol=0, atol=1e-12)


def test_a_plan_is_built_once_for_all_layers(monkeypatch):
    built = []
    monkeypatch.setattr(
        Visible, "allowed", lambda self, *a, real=Visible.allowed: built.append(1) or real(self, *a)
    )
    visible, kernels = square(doc_ids=DOCUMENTS), Kernels()
    q, k, v = draw(2, 2, 20, 20)
    for _ in range(2):
        plan = plan_attention(visible, dtype=q.dtype, heads=(2, 2), width=8, kernels=kernels)
        for _ in range(3):
            attention(q, k, v, plan)
    assert len(built) == 1
    assert not replace(visible, window=2).kept  # what was made for one says nothing of another


@pytest.mark.parametrize(("queries", "name"), [(512, "chunked"), (513, "sdpa")])
def test_many_queries_of_few_keys_keep_no_probabilities(queries, name):
    """As those of summaries: without causality they go all at once."""
    mask = torch.ones(1, 1, queries, 40, dtype=torch.bool)
    visible = Visible(1, queries, 40, torch.device("cpu"), causal=False, mask=mask)
    call = Call(torch.device("cpu"), torch.bfloat16, **attention_call(visible.facts, (2, 2), 8))
    assert Kernels().foresee("attention", call)[0] == name


@pytest.mark.parametrize("queries", [1, 5, 20, 30])
@pytest.mark.parametrize("window", [1, 7, 29])
def test_blocks_of_queries_look_at_their_windows_alone(queries, window, monkeypatch):
    """Behind a cache or not; no block has a number for a key that none of its queries sees."""
    monkeypatch.setattr(chunked, "QUERY_BLOCK", 8)
    visible = Visible(2, queries, 30, torch.device("cpu"), window=window)
    plan = plan_attention(
        visible, dtype=torch.float64, heads=(2, 2), width=8, kernels=Kernels({"attention": "chunked"})
    )
    for block in plan.built:
        assert block.bias.exp().any(2).all()
    q, k, v = draw(2, 2, queries, 30)
    expected = by_definition(q, k, v, visible.allowed())
    torch.testing.assert_close(attention(q, k, v, plan), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("keys", "window", "dtype", "name"),
    [
        (1_278, 512, torch.float32, "chunked"),
        (1_277, 512, torch.float32, "sdpa"),
        (1_024, None, torch.float32, "sdpa"),
        (100_000, 385, torch.bfloat16, "chunked"),
        (600, 386, torch.bfloat16, "sdpa"),
    ],
)
def test_long_rows_of_windows_go_block_by_block(keys, window, dtype, name):
    call = Call(torch.device("cpu"), dtype, **attention_call(training_facts(keys, window=window), (2, 2), 8))
    assert Kernels().foresee("attention", call)[0] == name


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"window": 0}, "window: must be at least 1 and causal"),
        ({"window": 3, "causal": False}, "window: must be at least 1 and causal"),
        ({"pattern": OnePass(torch.zeros(10), 2)}, "pattern: takes the place of causal"),
    ],
)
def test_a_description_that_makes_no_sense(what, message):
    with pytest.raises(ValueError, match=message):
        square(**what)


def test_what_does_not_fit_together():
    with pytest.raises(ValueError, match="are more than the 3 keys"):
        Visible(1, 4, 3, CPU)
    with pytest.raises(ValueError, match="a cached row is one document"):
        Visible(2, 3, 20, CPU, doc_ids=DOCUMENTS)
    for wrong, message in (({"heads": (4, 3)}, "4 query heads"), ({"dropout": 1.5}, "from 0 to 1")):
        options = {"heads": (4, 4), "width": 8, "dtype": torch.float32, "kernels": Kernels(), **wrong}
        with pytest.raises(ValueError, match=message):
            plan_attention(square(), **options)


# -- what FlashAttention is handed ---------------------------------------------------------------------------


def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """The contract of `varlen_attn`, in plain operations: what no document owns, it refuses."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (int(cu_q[0]), int(cu_q[-1])) == (0, len(q)) and (int(cu_k[0]), int(cu_k[-1])) == (0, len(k))
    assert enable_gqa or q.shape[1] == k.shape[1]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        assert 0 <= q1 - q0 <= max_q and 0 <= k1 - k0 <= max_k
        left, right = (torch.inf if side < 0 else side for side in window_size)
        at = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        distance = at - torch.arange(k1 - k0)
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1]) * scale
        scores = scores.masked_fill((distance > left) | (distance < -right), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[k0:k1]))
    return torch.cat(outputs)


@pytest.fixture(params=["torch", "torch without grouped heads", "flash_attn 2", "flash_attn 4"])
def by_offsets(request, monkeypatch):
    """Each library that takes offsets, as `flash` does it."""
    if request.param.startswith("torch"):
        monkeypatch.setattr(varlen.varlen, "varlen_attn", flash)
        monkeypatch.setattr(varlen, "GROUPED_HEADS", request.param == "torch")
        return varlen.BACKEND

    unlimited = -1 if request.param.endswith("2") else None

    def package(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=None,
        causal=False,
        window_size=(unlimited, unlimited),
    ):
        left, right = (-1 if side == unlimited else side for side in window_size)
        offsets = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        window = left, 0 if causal else right
        found = flash(q, k, v, *offsets, scale=softmax_scale, window_size=window, enable_gqa=True)
        return found if unlimited else (found, None)

    monkeypatch.setattr(flash_attn, "function_for", lambda gpu: package)
    return flash_attn.BACKEND


@pytest.mark.parametrize("docs", [None, DOCUMENTS])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_offsets_and_windows_mean_the_mask(by_offsets, docs, window, causal):
    if window is not None and not causal:
        return
    offsets = None if docs is None else torch.from_numpy(document_offsets(docs.numpy()))
    visible = square(doc_ids=docs, window=window, causal=causal, cu_seqlens=offsets)
    q, k, v = draw(4, 2, 20, 20)
    expected = by_definition(q, k, v, pair_by_pair(visible))
    torch.testing.assert_close(by_offsets(q, k, v, visible=visible), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_offsets_behind_a_cache(by_offsets, queries, window):
    q, k, v = draw(4, 2, queries, 20)
    visible = Visible(2, queries, 20, CPU, window=window)
    expected = by_definition(q, k, v, pair_by_pair(visible))
    torch.testing.assert_close(by_offsets(q, k, v, visible=visible), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 5, 20])
def test_a_token_sees_as_many_as_its_window(by_offsets, window):
    """Probabilities are uniform over what is seen, so their number can be counted."""
    q, k, _ = (torch.zeros(1, 1, 20, 8, dtype=torch.float64) for _ in range(3))
    v = torch.eye(20, dtype=torch.float64)[None, None]
    seen = (by_offsets(q, k, v, visible=square(rows=1, window=window)) > 0).sum(-1)
    assert seen[0, 0].tolist() == [min(t + 1, window) for t in range(20)]


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_empty_documents_change_nothing(by_offsets, empty):
    """First, in the middle, last."""
    q, k, v = draw(2, 2, 20, 20)
    offsets = [0, 11, 20, 22, 40]
    offsets.insert([0, 2, 5][empty], offsets[[0, 2, 4][empty]])
    visible = square(doc_ids=DOCUMENTS, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
    expected = by_definition(q, k, v, pair_by_pair(visible))
    torch.testing.assert_close(by_offsets(q, k, v, visible=visible), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 11, 20, 22], "rising from 0 to B T = 40, got from 0 to 22"),
        ([11, 20, 22, 40], "got from 11 to 40"),
        ([0, 11, 20, 22, 41], "got from 0 to 41"),
        ([0, 20, 11, 22, 40], "got some that go back"),
        ([0], r"got \(1,\) of torch.int32"),
        ([[0, 40]], r"got \(1, 2\) of torch.int32"),
    ],
)
def test_offsets_of_other_rows_are_refused(offsets, message):
    """Tokens that no document owns would be left as memory was."""
    with pytest.raises(ValueError, match=f"cu_seqlens: .*{message}"):
        Visible.causally(DOCUMENTS, doc_ids=DOCUMENTS, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"got \(2,\) of torch.int64"):
        square(doc_ids=DOCUMENTS, cu_seqlens=torch.tensor([0, 40]))


def test_varlen_takes_tensors_of_a_device_without_data():
    """Shapes and gradients of torch's operation, and nothing that waits for the device."""
    offsets = torch.from_numpy(document_offsets(DOCUMENTS.numpy())).to(META)
    visible = Visible(2, 20, 20, META, doc_ids=DOCUMENTS.to(META), cu_seqlens=offsets)
    q, k, v = (t.to(META).detach().requires_grad_() for t in draw(4, 4, 20, 20, torch.bfloat16))
    y = varlen.BACKEND(q, k, v, visible=visible)
    assert y.shape == q.shape and y.dtype == torch.bfloat16
    assert [g.shape for g in torch.autograd.grad(y.sum(), (q, k, v))] == [q.shape] * 3


# -- what FlexAttention is handed ----------------------------------------------------------------------------


def patterns():
    blocks = torch.tensor([0] * 3 + [1] * 4 + [2] * 3)
    ids = torch.tensor([[0] * 5 + [1] * 5, [0] * 10])
    own = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    for doc_ids in (None, ids):
        for noisy_only in (False, True):
            pattern = OnePass(blocks, 4, noisy_only)
            yield Visible(2, 10 if noisy_only else 20, 20, CPU, False, None, doc_ids, pattern=pattern)
    yield square(doc_ids=DOCUMENTS)
    yield square(doc_ids=DOCUMENTS, window=3)
    yield square(doc_ids=DOCUMENTS, causal=False)
    yield Visible(2, 4, 20, CPU, window=6)
    yield square(mask=own | torch.eye(20, dtype=torch.bool))
    yield square(mask=torch.ones(1, 1, 20, 20, dtype=torch.bool), causal=False)


PATTERNS = [*patterns()]


@pytest.mark.parametrize("visible", PATTERNS, ids=lambda visible: "-".join(visible.facts))
def test_the_function_of_a_mask_is_the_mask(visible):
    padded = 128
    found = create_mask(flex.mask_function(visible), 2, 1, padded, padded, "cpu")
    expected = visible.allowed().expand(2, -1, -1, -1)
    assert torch.equal(found[:, :, : visible.queries, : visible.keys], expected)
    assert not found[..., visible.keys :].any()  # nobody sees the padding
    assert found.any(-1).all()  # and its queries see something


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("visible", PATTERNS[1:6:2], ids=lambda visible: "-".join(visible.facts))
def test_flex_equals_the_reference(visible, softcap):
    """Forward, which is all that it has on a CPU."""
    q, k, v = (t.detach() for t in draw(4, 2, visible.queries, visible.keys, torch.float32, width=16))
    with torch.no_grad():
        found = flex.BACKEND(q, k, v, visible=visible, softcap=softcap)
    expected = by_definition(q, k, v, visible.allowed(), softcap)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_flex_refuses_tensors_of_another_length():
    visible = square()
    options = Options(torch.float32)
    q, k, v = (t.detach() for t in draw(1, 1, 20, 24, torch.float32, width=16))
    with pytest.raises(ValueError, match="made for 20 queries and 20 keys, and these are 20 and 24"):
        Plan.of(flex.BACKEND, visible, options).run(q, k, v)


# -- which of torch's fused kernels --------------------------------------------------------------------------


def test_cudnn_never_gets_a_mask_and_none_that_is_not_deterministic():
    def names(*args):
        return [backend.name for backend in sdpa.order(*args)]

    rest = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    assert names(H100, False, False) == ["CUDNN_ATTENTION", *rest]
    assert names(A100, False, False) == names(H100, False, True) == rest
    for gpu, deterministic in itertools.product((A100, H100), (False, True)):
        assert names(gpu, True, deterministic) == ["EFFICIENT_ATTENTION", "MATH"]
    assert sdpa.order(None, True, True) is None


def test_the_order_is_that_of_the_call(monkeypatch):
    """What `scaled_dot_product_attention` runs under."""
    seen = []
    monkeypatch.setattr(
        sdpa.F,
        "scaled_dot_product_attention",
        lambda *args, real=F.scaled_dot_product_attention, **more: (
            seen.append(torch._C._get_sdp_priority_order()) or real(*args, **more)
        ),
    )
    built = sdpa.Built(None, True, [sdpa.SDPBackend.MATH, sdpa.SDPBackend.EFFICIENT_ATTENTION])
    q, k, v = draw(2, 2, 4, 4)
    sdpa.attend(q, k, v, built, Options(q.dtype))
    assert seen[0][:2] == [int(sdpa.SDPBackend.MATH), int(sdpa.SDPBackend.EFFICIENT_ATTENTION)]


# -- compiled ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", ["reference", "chunked", "sdpa", "varlen", "flash_attn"])
def test_compiled_layers_take_a_new_plan_each_step(monkeypatch, path):
    """One graph, and the same outputs and gradients."""
    torch._dynamo.reset()
    if path == "varlen":
        monkeypatch.setattr(varlen.varlen, "varlen_attn", flash_of_torch)
    if path == "flash_attn":
        monkeypatch.setattr(flash_attn, "function_for", lambda gpu: package_of_torch)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=False)
    backend = {
        "reference": reference,
        "chunked": chunked,
        "sdpa": sdpa,
        "varlen": varlen,
        "flash_attn": flash_attn,
    }[path].BACKEND
    for seed in range(3):
        ids = (seed < DOCUMENTS).int()
        offsets = torch.from_numpy(document_offsets(ids.numpy()))
        visible = square(doc_ids=ids, cu_seqlens=offsets)
        plan = Plan.of(backend, visible, Options(torch.float64))
        q, k, v = draw(4, 2, 20, 20)
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            found = compiled(q, k, v, plan)
        expected = by_definition(q, k, v, visible.allowed())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for a, b in zip(
            torch.autograd.grad(found.sum(), (q, k, v)),
            torch.autograd.grad(expected.sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def package_of_torch(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    """`flash_of_torch` in the words of the package."""
    longest = max_seqlen_q, max_seqlen_k
    return flash_of_torch(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, scale=None, window_size=window_size)


def flash_of_torch(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """The same without asking for values, as a compiler sees it."""
    owner = torch.searchsorted(cu_q, torch.arange(len(q), dtype=torch.int32), right=True)
    at = torch.arange(len(q))
    allowed = (owner[:, None] == owner) & (at[:, None] >= at)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("graph_breaks", [False, True])
def test_flex_is_compiled_where_blocks_are_not(monkeypatch, graph_breaks):
    """Scoring and samples run blocks that training compiled as they were written; behind a break of a block's graph
    a compiler is at work already."""
    blocks, inner = CompileCounter(), CompileCounter()
    monkeypatch.setattr(flex.torch, "compile", partial(torch.compile, backend=inner))
    ran_as_written = []

    def scores(x):
        if not torch.compiler.is_compiling():
            ran_as_written.append(x)
        return x.sin()

    run = flex._compiled.__wrapped__(scores)

    class Block(torch.nn.Module):
        def forward(self, x):
            x = x + 1
            if graph_breaks:
                torch._dynamo.graph_break()
            return run(x)

    block, x = Block(), torch.ones(3)
    block.compile(backend=blocks)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        block(x)
        assert (blocks.frame_count, inner.frame_count, ran_as_written) == (0, 1, [])
        torch.testing.assert_close(block(x), (x + 1).sin())
    found = block(x)
    assert blocks.frame_count > 0 and ran_as_written == []
    torch.testing.assert_close(found, (x + 1).sin())
    assert torch._dynamo.eval_frame._stance.stance == "default"


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nothing_is_compiled_while_a_mode_of_dispatch_looks_on(where, monkeypatch):
    """Frames that torch does not compile for its sake would stay so in the whole process."""
    if where == "cpu":
        monkeypatch.setattr(flex, "_looked_on", lambda device: _get_current_dispatch_mode() is not None)
    generator = torch.Generator(where).manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 40, 16, generator=generator, device=where)
    visible = Visible(2, 40, 40, q.device, True, None, torch.arange(40, device=where).expand(2, 40) // 9)
    wanted = by_definition(q, k, v, visible.allowed())
    compiled = []
    monkeypatch.setattr(
        flex, "_compiled", lambda function, real=flex._compiled: compiled.append(1) or real(function)
    )
    with Watched():
        torch.testing.assert_close(flex.BACKEND(q, k, v, visible=visible), wanted, rtol=1e-5, atol=1e-5)
    assert not compiled
    again = replace(visible)
    torch.testing.assert_close(flex.BACKEND(q, k, v, visible=again), wanted, rtol=1e-3, atol=1e-3)


def test_flex_is_compiled_for_more_shapes_than_blocks_are(monkeypatch):
    """Rows of scoring come in some lengths and numbers."""
    graphs, ran_as_written = CompileCounter(), []
    monkeypatch.setattr(flex.torch, "compile", partial(torch.compile, backend=graphs))

    def scores(x):
        if not torch.compiler.is_compiling():
            ran_as_written.append(x)
        return x.sin()

    run = flex._compiled.__wrapped__(scores)
    for length in [*range(2, 12)] * 2:
        run(torch.ones(length))
    assert graphs.frame_count == 10 > torch._dynamo.config.recompile_limit
    assert ran_as_written == []


@pytest.mark.slow
def test_masks_of_many_lengths_are_made_by_few_graphs(monkeypatch):
    torch._dynamo.reset()
    graphs = CompileCounter()
    monkeypatch.setattr(flex.torch, "compile", partial(torch.compile, backend=graphs))
    make = flex._compiled.__wrapped__(flex.create_block_mask, dynamic=None)
    for length, rows in itertools.product((125, 256, 380, 509), (4, 3)):
        ids = (torch.arange(length) // 50).expand(rows, -1)
        sees = flex.mask_function(Visible(rows, length, length, CPU, doc_ids=ids))
        size = -(-length // flex.TILE) * flex.TILE
        more = {"B": rows, "H": None, "Q_LEN": size, "KV_LEN": size, "device": "cpu", "BLOCK_SIZE": flex.TILE}
        found, expected = make(sees, **more), flex.create_block_mask(sees, **more)
        assert torch.equal(found.to_dense(), expected.to_dense())
    assert graphs.frame_count <= 4


# -- offsets -------------------------------------------------------------------------------------------------


def test_offsets_say_where_documents_begin():
    found = document_offsets(DOCUMENTS.numpy().astype(np.int32))
    assert found.dtype == np.int32 and found.tolist() == [0, 11, 20, 22] + [40] * 61
    # A row begins a document, even with the id that the row before it ended with.
    assert document_offsets(np.zeros((2, 5), np.int32)).tolist() == [0, 5] + [10] * 63
    assert document_offsets(np.array([[7, 7, 3]])).tolist() == [0, 2] + [3] * 63
    assert document_offsets(np.zeros((1, 1), np.int32)).tolist() == [0] + [1] * 64


def test_the_number_of_offsets_changes_with_crowded_batches_only():
    generator = np.random.default_rng(0)
    for often in (0.0, 0.005, 0.01):
        ids = np.cumsum(generator.random((32, 256)) < often, axis=1)
        found = document_offsets(ids)
        assert len(found) == 1 + 128  # 32 rows of 4 documents of 64 tokens
        assert found[-1] == 32 * 256 and (np.diff(found) >= 0).all()
    crowded = document_offsets(np.tile(np.arange(256), (8, 1)))  # every token a document
    assert crowded.tolist() == list(range(8 * 256 + 1))
