"""What opens chunks, against a loop, in the three ways of laying; nothing but the places of chunks has a gradient."""

from __future__ import annotations

import pytest
import torch

from kernels import KERNELS
from kernels.choose import Call, Kernels
from kernels.compaction import reference as numbers
from kernels.device import H100, as_if
from kernels.downsample import downsample, reference
from kernels.tuned import forced
from models.hierarchy.places import bytes_of
from tests.kernels.interpret import interpreted, poisoned

TRITON = pytest.importorskip("kernels.downsample.triton", reason="Triton is not installed")
WAYS = {"reference": reference, "triton": TRITON.downsample}
LAYINGS = {"packed": (True, False), "padded": (False, True), "masked": (False, False)}
every_way = pytest.mark.parametrize("way", WAYS)


def loop(x, p, opens, source, chunk, dz, dweight):
    """z, P and the gradients of x and p, place by place."""
    z, weight = x.new_zeros(dz.shape), p.new_zeros(dweight.shape)
    dx, dp = torch.zeros_like(x), torch.zeros_like(p)
    for row, marks in enumerate(opens.tolist()):
        for number, place in enumerate(place for place, opened in enumerate(marks) if opened):
            z[row, number], weight[row, number] = x[row, place], p[row, place]
            dx[row, place], dp[row, place] = dz[row, number], dweight[row, number]
    return z, weight, dx, dp


def check(way, opens, source, chunk, width=5):
    (rows, places), chunks = opens.shape, source.shape[1]
    draw = torch.Generator().manual_seed(places)
    x, p, dz, dweight = (
        torch.randn(shape, generator=draw)
        for shape in ((rows, places, width), (rows, places), (rows, chunks, width), (rows, chunks))
    )
    given = [t.clone().requires_grad_() for t in (x, p)]
    tiles = {"WIDTH": 4}
    with (
        interpreted(),
        poisoned(),
        forced("downsample.forward", {"CHUNKS": 4, **tiles}),
        forced("downsample.backward", {"PLACES": 4, **tiles}),
    ):
        z, weight = WAYS[way](*given, opens, source, chunk)
        found = z, weight, *torch.autograd.grad((z, weight), given, (dz, dweight))
    for a, b in zip(found, loop(x, p, opens, source, chunk, dz, dweight), strict=True):
        assert torch.equal(a, b)


@every_way
@pytest.mark.parametrize("laying", LAYINGS)
@pytest.mark.parametrize("opens", ["all", "first", "last", "some"])
def test_every_laying_equals_the_loop(way, laying, opens, monkeypatch):
    """Rows of unlike numbers of chunks. What is behind a row's chunks is 0, and its gradient reaches no place."""
    monkeypatch.setattr("models.hierarchy.places.BUCKET", 4)
    packed, padded = LAYINGS[laying]
    marks = torch.zeros(3, 11, dtype=torch.bool)
    marks[:, 0] = True
    marks |= {
        "all": torch.ones(11) > 0,
        "first": torch.zeros(11) > 0,
        "last": torch.arange(11) == 10,
        "some": torch.rand(3, 11, generator=torch.Generator().manual_seed(1))
        < torch.tensor([0.1, 0.5, 0.9])[:, None],
    }[opens]
    places = bytes_of(torch.zeros(3, 11, dtype=torch.int64), None, padded)
    within, source, chunk = places.chunks(marks, packed, Kernels())
    assert within.ids.shape == source.shape
    check(way, marks.flatten()[None] if packed else marks, source, chunk)


@every_way
@pytest.mark.parametrize("width", [1, 4, 5, 9])
def test_edges_of_tiles_and_rows_without_chunks(way, width):
    opens = torch.rand(4, 13, generator=torch.Generator().manual_seed(2)) < 0.4
    opens[2] = False
    for chunks in (int(opens.sum(1).max()), 13):
        check(way, opens, *numbers(opens, chunks), width)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": (2, 5)}, r"x \(2, 5\)"),
        ({"p": (2, 4)}, r"p \(2, 4\)"),
        ({"opens": (10,)}, r"opens \(10,\)"),
        ({"source": (3,)}, r"source \(3,\)"),
        ({"chunk": (2, 3)}, r"chunk \(2, 3\)"),
        ({"x": (2, 0, 4), "p": (2, 0), "opens": (2, 0), "chunk": (2, 0)}, "M >= 1 if C is"),
    ],
)
def test_shapes_that_do_not_fit(change, said):
    kinds = {"x": torch.float32, "p": torch.float32, "opens": torch.bool}
    shapes = {"x": (2, 5, 4), "p": (2, 5), "opens": (2, 5), "source": (2, 3), "chunk": (2, 5), **change}
    given = {name: torch.zeros(shape, dtype=kinds.get(name, torch.int64)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=said):
        downsample(**given, kernels=Kernels())


def test_what_is_chosen():
    """The definition, unless a GPU's gain was measured there."""
    kernels, opens = Kernels(), torch.ones(1, 2, dtype=torch.bool)
    downsample(torch.ones(1, 2, 3), torch.ones(1, 2), opens, *numbers(opens, 2), kernels=kernels)
    assert kernels.used["downsample"] == {"reference": "auto: the plain definition"}
    with as_if(H100):
        name, why = Kernels().foresee("downsample", Call(torch.device("cuda"), torch.float32, columns=3))
    assert (name, "not measured on sm_90" in why) == ("reference", True)
    assert set(KERNELS["downsample"].implementations) == {"reference", "triton"}
