"""Numbers of chunks, against counting: at the edges of tiles, for all, none, the first and the last place."""

from __future__ import annotations

import pytest
import torch

from kernels import KERNELS
from kernels.choose import Call, Kernels
from kernels.compaction import compaction, reference
from kernels.device import H100, as_if
from kernels.tuned import forced
from tests.kernels.interpret import interpreted, poisoned

TRITON = pytest.importorskip("kernels.compaction.triton", reason="Triton is not installed")
WAYS = {"reference": reference, "triton": TRITON.compaction}
every_way = pytest.mark.parametrize("way", WAYS)


def counted(opens, chunks):
    source, chunk = torch.zeros(len(opens), chunks, dtype=torch.int64), torch.zeros(opens.shape).long()
    for row, marks in enumerate(opens.tolist()):
        number = -1
        for place, opened in enumerate(marks):
            if opened:
                number += 1
                source[row, number] = place
            chunk[row, place] = number
    return source, chunk


def check(way, opens, chunks):
    with interpreted(), poisoned(), forced("compaction", {"PLACES": 4}):
        found = WAYS[way](opens, chunks)
    for a, b in zip(found, counted(opens, chunks), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@every_way
@pytest.mark.parametrize("places", [1, 3, 4, 5, 21])
@pytest.mark.parametrize("opens", ["all", "none", "first", "last", "some"])
def test_every_way_counts(way, places, opens):
    """Rows of unlike numbers of chunks, in as much room as there are places, and in no more than is needed."""
    order = torch.arange(places)
    drawn = torch.rand(3, places, generator=torch.Generator().manual_seed(places))
    marks = {
        "all": torch.ones(3, places) > 0,
        "none": torch.zeros(3, places) > 0,
        "first": (order == 0).expand(3, -1),
        "last": (order == places - 1).expand(3, -1),
        "some": drawn < torch.tensor([0.1, 0.5, 0.9])[:, None],
    }[opens]
    check(way, marks, places)
    check(way, marks, int(marks.sum(1).max()))


@every_way
@pytest.mark.parametrize(("rows", "places", "chunks"), [(0, 4, 2), (2, 0, 3), (2, 0, 0)])
def test_nothing_to_count(way, rows, places, chunks):
    check(way, torch.ones(rows, places, dtype=torch.bool), chunks)


@pytest.mark.parametrize(
    ("opens", "chunks", "said"),
    [
        (torch.ones(4, dtype=torch.bool), 2, r"\(4,\) torch.bool and 2"),
        (torch.ones(1, 4), 2, "torch.float32"),
        (torch.ones(1, 4, dtype=torch.bool), -1, "and -1"),
    ],
)
def test_what_is_refused(opens, chunks, said):
    with pytest.raises(ValueError, match=said):
        compaction(opens, chunks, kernels=Kernels())


def test_what_is_chosen():
    """The definition, unless a GPU's gain was measured there."""
    kernels = Kernels()
    compaction(torch.ones(1, 4, dtype=torch.bool), 4, kernels=kernels)
    assert kernels.used["compaction"] == {"reference": "auto: the plain definition"}
    with as_if(H100):
        name, why = Kernels().foresee("compaction", Call(torch.device("cuda"), torch.bool))
    assert (name, "not measured on sm_90" in why) == ("reference", True)
    assert set(KERNELS["compaction"].implementations) == {"reference", "triton"}
