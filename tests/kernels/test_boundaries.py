"""Boundaries: against the equations place by place in fp64, at ties, at the edges of tiles and of documents."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import KERNELS
from kernels.against import deviation
from kernels.boundaries import boundaries, reference
from kernels.choose import Call, Kernels
from kernels.device import H100, as_if
from kernels.tuned import forced
from tests.kernels.interpret import interpreted, poisoned

TRITON = pytest.importorskip("kernels.boundaries.triton", reason="Triton is not installed")
WAYS = {"reference": reference, "triton": TRITON.boundaries}
every_way = pytest.mark.parametrize("way", WAYS)


def length(x):
    return max(math.sqrt(sum(a * a for a in x)), 1e-12)


def loop(q, k, begins, valid, last, dp, dc):
    """p, b, c and the gradients of q and k, number by number, in fp64."""
    q, k, dp, dc = (t.detach().double() for t in (q, k, dp, dc))
    p, c = torch.ones_like(dp), torch.ones_like(dp)
    opens, dq, dk = torch.zeros_like(begins), torch.zeros_like(q), torch.zeros_like(k)
    for row in range(len(q)):
        for place in range(q.shape[1]):
            start = bool(begins[row, place]) or (last is None and place == 0)
            before = q[row, place - 1] if place else (None if last is None else last[row].double())
            if not start:
                left, right = (t / length(t.tolist()) for t in (before, k[row, place]))
                cosine = left @ right
                p[row, place] = min(max((1 - cosine) / 2, 0), 1)
            opened = bool(p[row, place] > 0.5) and (valid is None or bool(valid[row, place]))
            opens[row, place] = opened
            c[row, place] = p[row, place] if opened else 1 - p[row, place]
            if start:
                continue
            change = -(dp[row, place] + (dc[row, place] if opened else -dc[row, place])) / 2
            dk[row, place] = change * (left - cosine * right) / length(k[row, place].tolist())
            if place:
                dq[row, place - 1] = change * (right - cosine * left) / length(before.tolist())
    return p, opens, c, dq, dk


def found(way, q, k, begins, valid, last, dp, dc):
    """The same of an implementation."""
    given = [t.detach().clone().requires_grad_() for t in (q, k)]
    with interpreted(), poisoned():
        p, opens, c = WAYS[way](*given, begins, valid, last)
        return p, opens, c, *torch.autograd.grad((p, c), given, (dp, dc))


def call_of(rows, places, width, every=4, padded=False, goes_on=False):
    draw = torch.Generator().manual_seed(places)
    q, k = (torch.randn(rows, places, width, generator=draw) for _ in range(2))
    dp, dc = (torch.randn(rows, places, generator=draw) for _ in range(2))
    begins = ((torch.arange(places) + 1) % every == 0).expand(rows, places)
    valid = (torch.arange(places) < places - 2).expand(rows, places) if padded else None
    last = torch.randn(rows, width, generator=draw) if goes_on else None
    return q, k, begins, valid, last, dp, dc


def same(call, result):
    expected = loop(*call)
    assert torch.equal(result[1], expected[1])
    assert max(map(deviation, result, expected)) < 3e-6


@every_way
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("goes_on", [False, True])
def test_every_way_equals_the_equations(way, padded, goes_on):
    """Both of them open some places and not others; what is not valid opens none, and is as sure of that as p says."""
    call = call_of(2, 13, 5, padded=padded, goes_on=goes_on)
    result = found(way, *call)
    same(call, result)
    assert 0 < result[1].sum() < result[1].numel()
    assert not padded or not result[1][:, -2:].any()


@pytest.mark.parametrize("places", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("width", [3, 4, 9])
def test_edges_of_tiles(places, width):
    """Of neighbours in unlike tiles each gets its part, and the last query, which none is compared with, gets 0."""
    call = call_of(2, places, width, every=100)
    with (
        forced("boundaries.forward", {"PLACES": 4, "WIDTH": 4}),
        forced("boundaries.backward", {"PLACES": 4, "WIDTH": 4}),
    ):
        result = found("triton", *call)
    same(call, result)
    assert not result[3][:, -1].any() and result[3][:, :-1].any(-1).all()


@every_way
def test_a_tie_opens_nothing_and_parallel_neighbours_neither(way):
    q = torch.tensor([[1.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 0.0]])[None]
    k = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 0.0], [-2.0, 0.0]])[None]
    begins = torch.zeros(1, 4, dtype=torch.bool)
    with interpreted(), poisoned():
        p, opens, c = WAYS[way](q, k, begins, None, None)
    assert torch.equal(p, torch.tensor([[1.0, 0.5, 0.0, 1.0]]))
    assert torch.equal(opens, torch.tensor([[True, False, False, True]]))
    assert torch.equal(c, torch.tensor([[1.0, 0.5, 1.0, 1.0]]))


@every_way
def test_without_a_direction(way):
    """All zeros, and numbers whose length is below that which lengths are raised to."""
    q, k, begins, valid, last, dp, dc = call_of(1, 6, 4, every=100)
    q[:, 1], k[:, 3], q[:, 3], k[:, 5] = 0, 0, q[:, 3] * 1e-14, k[:, 5] * 1e-14
    result = found(way, q, k, begins, valid, last, dp, dc)
    assert all(t.isfinite().all() for t in result)
    # Where a length was raised, no direction is taken out of the gradient.
    for row in (1, 3):
        following = k[0, row + 1].double()
        sign = 1 if result[1][0, row + 1] else -1
        change = -(dp[0, row + 1] + sign * dc[0, row + 1]) / 2
        torch.testing.assert_close(
            result[3][0, row].double(), change * following / following.norm() / 1e-12, rtol=1e-5, atol=0
        )


@every_way
def test_in_pieces_it_is_the_same(way):
    """Behind the query of the last place, which is told as it is."""
    q, k, begins, *_ = call_of(2, 11, 5)
    with interpreted(), poisoned():
        whole = WAYS[way](q, k, begins, None, None)
        first = WAYS[way](q[:, :6], k[:, :6], begins[:, :6], None, None)
        then = WAYS[way](q[:, 6:], k[:, 6:], begins[:, 6:], None, q[:, 5])
    for a, b, c in zip(whole, first, then, strict=True):
        assert torch.equal(a, torch.cat((b, c), 1))


@every_way
def test_twice_the_same_bits(way):
    call = call_of(2, 21, 33)
    for a, b in zip(found(way, *call), found(way, *call), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": (2, 5, 3)}, r"k \(2, 5, 3\)"),
        ({"q": (5, 4), "k": (5, 4)}, r"q \(5, 4\)"),
        ({"begins": (2, 4)}, r"begins \(2, 4\)"),
        ({"valid": (5,)}, r"valid \(5,\)"),
        ({"last": (2, 3)}, r"last \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(change, said):
    shapes = {"q": (2, 5, 4), "k": (2, 5, 4), "begins": (2, 5), **change}
    given = {
        name: torch.zeros(s, dtype=torch.bool if name in ("begins", "valid") else torch.float32)
        for name, s in shapes.items()
    }
    with pytest.raises(ValueError, match=said):
        boundaries(**given, kernels=Kernels())


def test_what_says_where_documents_begin_is_no_number():
    q = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"begins \(1, 2\) torch.int64"):
        boundaries(q, q, torch.zeros(1, 2, dtype=torch.int64), kernels=Kernels())


def test_what_is_chosen():
    """The definition, unless a GPU's gain was measured there."""
    kernels, q = Kernels(), torch.ones(1, 2, 3)
    boundaries(q, q, q[..., 0] > 0, kernels=kernels)
    assert kernels.used["boundaries"] == {"reference": "auto: the plain definition"}
    with as_if(H100):
        name, why = Kernels().foresee("boundaries", Call(torch.device("cuda"), torch.float32, columns=3))
    assert (name, "not measured on sm_90" in why) == ("reference", True)
    assert set(KERNELS["boundaries"].implementations) == {"reference", "triton"}
