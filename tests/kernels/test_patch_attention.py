"""Attention within patches: against a loop over places in fp64, at the edges of tiles, patches and documents."""

from __future__ import annotations

import pytest
import torch

from kernels import KERNELS
from kernels.against import deviation
from kernels.choose import Call, Kernels
from kernels.device import H100, as_if
from kernels.patch_attention import Patches, patch_attention, patch_call, plan_patches
from kernels.patch_attention.library import BACKEND as LIBRARY
from kernels.patch_attention.reference import BACKEND as REFERENCE
from kernels.tuned import forced
from tests.kernels.interpret import interpreted, poisoned

TRITON = pytest.importorskip("kernels.patch_attention.triton", reason="Triton is not installed")
WAYS = {"reference": REFERENCE, "library": LIBRARY, "triton": TRITON.BACKEND}
every_way = pytest.mark.parametrize("way", WAYS)


def sees(patches, row, query, key):
    """By what it says of them, one pair at a time."""
    size, known = patches.size, patches.known
    if key > query or (known is not None and not known[row, key] and key != query):
        return False
    own, other = query // size, key // size
    if own == other:
        return True
    same = patches.documents[row, own] == patches.documents[row, other]
    return bool(other == own - 1 and key % size >= size - patches.reach and same)


def loop(q, k, v, patches, do):
    """The output and the gradients of q, k and v for `do`, number by number, in fp64."""
    q, k, v, do = (t.detach().double() for t in (q, k, v, do))
    o, dq, dk, dv = (torch.zeros_like(t) for t in (q, q, k, v))
    scale = q.shape[3] ** -0.5
    for row in range(len(q)):
        for query in range(q.shape[1]):
            keys = [key for key in range(query + 1) if sees(patches, row, query, key)]
            for head in range(q.shape[2]):
                asked, grad = q[row, query, head], do[row, query, head]
                shares = (k[row, keys, head] @ asked * scale).softmax(0)
                o[row, query, head] = shares @ v[row, keys, head]
                dshares = v[row, keys, head] @ grad
                dscores = shares * (dshares - shares @ dshares) * scale
                dq[row, query, head] = dscores @ k[row, keys, head]
                dk[row, keys, head] += dscores[:, None] * asked
                dv[row, keys, head] += shares[:, None] * grad
    return o, dq, dk, dv


def found(way, q, k, v, patches, do, rows=16):
    """The same of an implementation; `rows` of a tile."""
    given = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    with (
        interpreted(),
        poisoned(),
        forced("patch_attention.forward", {"ROWS": rows}),
        forced("patch_attention.backward", {"ROWS": rows}),
    ):
        o = WAYS[way](*given, patches=patches)
        return o, *torch.autograd.grad(o, given, do)


def call_of(documents, size, reach, known=None, heads=2, width=6):
    documents = torch.tensor(documents)
    rows, patches = documents.shape
    draw = torch.Generator().manual_seed(size)
    q, k, v, do = (torch.randn(rows, patches * size, heads, width, generator=draw) for _ in range(4))
    return q, k, v, Patches(size, reach, documents, known), do


def same(call, result):
    for a, b in zip(result, loop(*call), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-6 * max(1, float(b.abs().max())))


DOCUMENTS = [[0, 0, 1, 1, 1, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4, 0]]


@every_way
@pytest.mark.parametrize(("size", "reach"), [(1, 0), (1, 1), (4, 0), (4, 2), (4, 4), (5, 3)])
def test_every_way_equals_the_loop(way, size, reach):
    """Documents that begin in the middle of a tile and at its edge, in several tiles."""
    call = call_of(DOCUMENTS, size, reach)
    same(call, found(way, *call))


@every_way
@pytest.mark.parametrize("reach", [0, 2])
def test_places_that_hold_nothing_are_seen_by_themselves_alone(way, reach):
    known = torch.rand(2, 36, generator=torch.Generator().manual_seed(1)) < 0.6
    call = call_of(DOCUMENTS, 4, reach, known)
    q, _, v, patches, _ = call
    result = found(way, *call)
    same(call, result)
    alone = [
        (row, place)
        for row, place in (~known).nonzero().tolist()
        if not any(sees(patches, row, place, key) for key in range(place))
    ]
    assert alone
    for row, place in alone:
        torch.testing.assert_close(result[0][row, place], v[row, place])


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_any_tile(rows):
    """Of one patch that fills it, of several with places to spare, of more than the row has."""
    for size, reach in ((16, 16), (5, 5), (12, 1)):
        call = call_of([[0] * 6, [0, 0, 0, 1, 1, 1]], size, reach, heads=1)
        same(call, found("triton", *call, rows=rows))


@every_way
def test_no_document_changes_another(way):
    """Bit for bit: what is in one, its last place included, is nothing to those before and behind."""
    call = call_of(DOCUMENTS, 4, 4)
    before = found(way, *call)
    inside = slice(2 * 4, 5 * 4)  # the second document of the first row
    for t in call[:3]:
        t[0, inside] = 100
    after = found(way, *call)
    others = torch.ones(36, dtype=torch.bool)
    others[inside] = False
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[0, others], b[0, others]) and torch.equal(a[1], b[1])
    assert not torch.equal(before[0][0, inside], after[0][0, inside])


@every_way
def test_the_patch_before_is_seen_to_its_reach_and_no_further(way):
    q, k, v, patches, do = call_of([[0] * 9], 4, 2)
    seen = found(way, q, k, v, patches, do)[0]
    changed = v.clone()
    changed[:, [4 * n + place for n in range(9) for place in (0, 1)]] += 1
    for place in (0, 2):
        here = found(way, q, k, changed, patches, do)[0][:, place::4] - seen[:, place::4]
        own = here[:, :1]  # of the first patch, which sees itself alone
        assert (own > 0.1).all() and (here > 0).all()
    changed = v.clone()
    changed[:, 4:6] += 1  # out of the reach of the patch behind
    after = found(way, q, k, changed, patches, do)[0]
    assert torch.equal(after[:, 8:], seen[:, 8:]) and not torch.equal(after[:, 4:8], seen[:, 4:8])


@every_way
@pytest.mark.parametrize("far_above", [False, True])
def test_scores_far_from_0(way, far_above):
    """Whatever stands beside a tile counts as nothing, and not as a score of 0, which these are far below; also where
    those of the patch before are `far_above` them."""
    q, k, v, patches, do = call_of(DOCUMENTS, 5, 2)
    q, k = torch.full_like(q, 7), torch.full_like(k, -7) + 0.01 * k
    if far_above:
        k = torch.where((torch.arange(45) % 5 >= 3)[:, None, None], -k, k)
    call = q, k, v, patches, do
    result = found(way, *call)
    assert all(t.isfinite().all() for t in result)
    assert max(map(deviation, result, loop(*call))) < 1e-4


@every_way
def test_twice_the_same_bits(way):
    call = call_of(DOCUMENTS, 4, 2)
    for a, b in zip(found(way, *call), found(way, *call), strict=True):
        assert torch.equal(a, b)


def test_dropout_is_of_the_probabilities():
    """In the mean nothing changes, and no kernel is taken that has none."""
    q, k, v, patches, _ = call_of([[0, 0]], 2, 1)
    for way in ("reference", "library"):
        torch.manual_seed(0)
        mean = sum(WAYS[way](q, k, v, patches=patches, dropout=0.3) for _ in range(1000)) / 1000
        torch.testing.assert_close(mean, WAYS[way](q, k, v, patches=patches), atol=0.15, rtol=0)
        assert not torch.equal(mean, WAYS[way](q, k, v, patches=patches))
    with interpreted(), pytest.raises(ValueError, match="it has no dropout"):
        plan_patches(
            patches,
            dtype=q.dtype,
            heads=2,
            width=6,
            dropout=0.3,
            kernels=Kernels({"patch_attention": "triton"}),
        )


@pytest.mark.parametrize(
    ("size", "width", "said"), [(65, 8, "more than 64 places"), (8, 129, "heads of 129 are too wide")]
)
def test_what_is_beyond_the_kernel(size, width, said):
    call = Call(torch.device("cuda"), torch.float32, **patch_call(size, width))
    with as_if(H100):
        assert said in Kernels().lacking("patch_attention", "triton", call)
        assert Kernels().foresee("patch_attention", call)[0] == "library"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reach": 5}, "from 0 to the 4 places of the patch before, got 5"),
        ({"reach": -1}, "got -1"),
        ({"size": 0, "reach": 0}, "size: must be at least 1, got 0"),
        ({"documents": torch.zeros(6)}, r"got \(6,\)"),
        (
            {"known": torch.ones(2, 11, dtype=torch.bool)},
            r"known \(B, 4 K\) are needed, got \(2, 3\) and \(2, 11\)",
        ),
    ],
)
def test_patches_that_cannot_be(given, said):
    with pytest.raises(ValueError, match=said):
        Patches(**{"size": 4, "reach": 2, "documents": torch.zeros(2, 3), **given})


def test_what_does_not_fit_the_plan():
    patches = Patches(4, 2, torch.zeros(2, 3))
    plan = plan_patches(patches, dtype=torch.float32, heads=2, width=8, kernels=Kernels())
    q = torch.zeros(2, 12, 2, 8)
    for given in ((q[:, :11], q, q), (q, q[:1], q), (q[..., 0], q[..., 0], q[..., 0])):
        with pytest.raises(ValueError, match="of 2 x 3 patches of 4 are needed"):
            patch_attention(*given, plan)
    with pytest.raises(ValueError, match=r"dropout: must be from 0 to 1, got 1\.5"):
        plan_patches(patches, dtype=q.dtype, heads=2, width=8, dropout=1.5, kernels=Kernels())


def test_what_is_chosen(monkeypatch):
    """The library's rows, unless a GPU's gain was measured there, in 16 bits; of these, what `attention` takes."""
    kernels = Kernels()
    patches = Patches(4, 2, torch.zeros(2, 3))
    plan_patches(patches, dtype=torch.float32, heads=2, width=8, kernels=kernels)
    assert kernels.used["patch_attention"] == {"library": "auto: every patch a row of attention"}
    assert [*kernels.used["attention"]] == ["sdpa"]
    with as_if(H100):
        call = Call(torch.device("cuda"), torch.bfloat16, **patch_call(4, 8))
        name, why = Kernels().foresee("patch_attention", call)
        assert (name, "not triton: not measured on sm_90" in why) == ("library", True)
        monkeypatch.setattr("kernels.patch_attention.verdict", lambda *asked: (True, "measured"))
        assert Kernels().foresee("patch_attention", call) == ("triton", "auto: measured")
        single = Call(call.device, torch.float32, **patch_call(4, 8))
        name, why = Kernels().foresee("patch_attention", single)
    assert (name, "tensor cores multiply no fp32" in why) == ("library", True)
    assert set(KERNELS["patch_attention"].implementations) == {"reference", "library", "triton"}
