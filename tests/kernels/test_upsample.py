"""Chunks over their places: against a loop in fp64, in the three ways of laying, at the edges of tiles and of runs."""

from __future__ import annotations

import pytest
import torch

from kernels import KERNELS
from kernels.against import deviation
from kernels.choose import Call, Kernels
from kernels.device import H100, as_if
from kernels.tuned import forced
from kernels.upsample import reference, upsample
from models.hierarchy.chunking import straight_through
from models.hierarchy.places import bytes_of
from tests.kernels.interpret import interpreted, poisoned

TRITON = pytest.importorskip("kernels.upsample.triton", reason="Triton is not installed")
WAYS = {"reference": reference, "triton": TRITON.upsample}
LAYINGS = {"packed": (True, False), "padded": (False, True), "masked": (False, False)}
every_way = pytest.mark.parametrize("way", WAYS)


def loop(z, chunk, scale, residual, dout):
    """The output and the gradients of z, scale and residual for `dout`, number by number, in fp64."""
    z, scale, residual, dout = (t.detach().double() for t in (z, scale, residual, dout))
    out, dz, dscale = residual.clone(), torch.zeros_like(z), torch.zeros_like(scale)
    for row, places in enumerate(chunk.tolist()):
        for place, number in enumerate(places):
            out[row, place] += scale[row, place] * z[row, number]
            dz[row, number] += scale[row, place] * dout[row, place]
            dscale[row, place] = dout[row, place] @ z[row, number]
    return out, dz, dscale, dout


def found(way, z, chunk, scale, residual, dout):
    """The same of an implementation."""
    given = [t.detach().clone().requires_grad_() for t in (z, scale, residual)]
    with interpreted(), poisoned():
        out = WAYS[way](given[0], chunk, given[1], given[2], dtype=torch.float32)
        return out, *torch.autograd.grad(out, given, dout)


def drawn(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def call_of(chunk, chunks, width=3):
    rows, places = chunk.shape
    z, scale, residual, dout = drawn(
        (rows, chunks, width), (rows, places), (rows, places, width), (rows, places, width)
    )
    return z, chunk, scale, residual, dout


def same(a, b):
    assert max(map(deviation, a, b)) < 3e-6


@every_way
@pytest.mark.parametrize("laying", LAYINGS)
@pytest.mark.parametrize("opens", ["all", "first", "last", "some"])
def test_every_laying_equals_the_loop(way, laying, opens, monkeypatch):
    """Rows of unlike numbers of chunks; the gradients of chunks that are not there are 0."""
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
    within, _, chunk = bytes_of(torch.zeros(3, 11, dtype=torch.int64), None, padded).chunks(
        marks, packed, Kernels()
    )
    call = call_of(chunk, within.ids.shape[1])
    result = found(way, *call)
    same(result, loop(*call))
    if within.valid is not None:
        assert not result[1][~within.valid].any()


def test_layings_give_the_same():
    """Of the same rows: each place is told of its own row's chunk, whose gradient its own places make."""
    marks = torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < 0.4
    marks[:, 0] = True
    (of_places,) = drawn((3, 11, 2), seed=1)
    scale, residual, dout = drawn((3, 11), (3, 11, 2), (3, 11, 2), seed=2)
    results = []
    for packed in (True, False):
        flat = (lambda t: t.flatten(0, 1)[None]) if packed else (lambda t: t)
        _, source, chunk = bytes_of(marks.long(), None).chunks(marks, packed, Kernels())
        z = torch.stack([t[s] for t, s in zip(flat(of_places), source, strict=True)])
        out, dz, *rest = found("triton", z, chunk, flat(scale), flat(residual), flat(dout))
        at = flat(torch.arange(33).view(3, 11)).gather(1, source)
        first = torch.zeros(33, 2).index_add_(0, at.flatten(), dz.flatten(0, 1))
        results.append([t.reshape(3, 11, -1) for t in (out, first, *rest)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [1, 4, 5])
def test_runs_at_the_edges_of_tiles(width):
    """Of one place less than a tile has, as many, one more, several tiles; chunks between that have none."""
    runs = [3, 0, 4, 5, 0, 0, 1, 13, 8]
    chunk = torch.arange(len(runs)).repeat_interleave(torch.tensor(runs))[None].repeat(2, 1)
    call = call_of(chunk, len(runs) + 2, width)
    tiles = {"PLACES": 4, "WIDTH": 4}
    with forced("upsample.forward", tiles), forced("upsample.backward", tiles):
        result = found("triton", *call)
    same(result, loop(*call))
    empty = torch.tensor([*runs, 0, 0]) == 0
    assert not result[1][:, empty].any() and result[1][:, ~empty].any(-1).all()


@every_way
def test_what_is_laid_over_places_behind_a_straight_through_estimator(way):
    """The sum itself, bit for bit; of how sure the router was, what its place's chunk makes of the gradient."""
    z, chunk, c, residual, dout = call_of(torch.tensor([[0, 0, 1, 2, 2, 2]]), 3)
    c = c.sigmoid().requires_grad_()
    with interpreted(), poisoned():
        out = WAYS[way](z, chunk, straight_through(c), residual, dtype=torch.float32)
        (dc,) = torch.autograd.grad(out, c, dout)
    assert torch.equal(out, z[0][chunk] + residual)
    torch.testing.assert_close(dc, (dout * z[0][chunk]).sum(-1))


@every_way
def test_twice_the_same_bits(way):
    call = call_of(torch.arange(9).repeat_interleave(7)[None], 9, 33)
    for a, b in zip(found(way, *call), found(way, *call), strict=True):
        assert torch.equal(a, b)


@every_way
def test_the_sum_is_rounded_once(way):
    """Numbers in fp32 and a result in bf16, as autocast has it: rounded, and not made of what was rounded."""
    z, chunk, scale, residual, _ = call_of(torch.arange(40)[None] // 3, 14, 8)
    with interpreted():
        # The interpreter cuts bf16 off where a GPU rounds: what fp16 makes is rounded in both.
        out = WAYS[way](z, chunk, scale, residual, dtype=torch.float16)
    exact = scale[..., None].double() * z[0][chunk].double() + residual.double()
    assert out.dtype == torch.float16
    assert ((out.double() - exact).abs() <= exact.abs() * 2.0**-11 * 1.001 + 1e-6).all()


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((2, 3), (2, 5), (2, 5), (2, 5, 4)), "got z (2, 3)"),
        (((2, 0, 4), (2, 5), (2, 5), (2, 5, 4)), "C >= 1 if M is"),
        (((1, 3, 4), (2, 5), (2, 5), (2, 5, 4)), "chunk (2, 5) torch.int64"),
        (((2, 3, 4), (2, 5), (2, 4), (2, 5, 4)), "scale (2, 4)"),
        (((2, 3, 4), (2, 5), (2, 5), (2, 5, 3)), "residual (2, 5, 3)"),
        (((2, 3, 4), (10,), (10,), (10, 4)), "chunk (10,)"),
    ],
)
def test_shapes_that_do_not_fit(shapes, said):
    z, chunk, scale, residual = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError) as raised:
        upsample(z, chunk.long(), scale, residual, dtype=torch.float32, kernels=Kernels())
    assert said in str(raised.value)


def test_numbers_that_are_no_indices():
    z, chunk, scale, residual, _ = call_of(torch.zeros(1, 2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"chunk \(1, 2\) torch.float32"):
        upsample(z, chunk.float(), scale, residual, dtype=torch.float32, kernels=Kernels())


def test_what_is_chosen():
    """The definition, unless a GPU's gain was measured there."""
    kernels = Kernels()
    z, chunk, scale, residual, _ = call_of(torch.zeros(1, 2, dtype=torch.int64), 1)
    upsample(z, chunk, scale, residual, dtype=torch.float32, kernels=kernels)
    assert kernels.used["upsample"] == {"reference": "auto: the plain definition"}
    with pytest.raises(ValueError, match="upsample=triton is not possible here: it runs on cuda"):
        upsample(z, chunk, scale, residual, dtype=torch.float32, kernels=Kernels({"upsample": "triton"}))
    with as_if(H100):
        name, why = Kernels().foresee("upsample", Call(torch.device("cuda"), torch.float32, columns=3))
    assert (name, "not measured on sm_90" in why) == ("reference", True)
    assert set(KERNELS["upsample"].implementations) == {"reference", "triton"}
