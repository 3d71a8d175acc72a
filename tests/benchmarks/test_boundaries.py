"""Where hierarchies cut: shares of what was cut, of each stage."""

import pytest
import torch

from adapters.base import Annotation, Span, Spans
from benchmarks.boundaries import edges, shares
from tests.contract.tiny import adapter_of, move_away_from_uniform

TEXT = b"def f(x):\n  return x_1"


def test_edges_are_where_identifiers_and_white_space_begin_and_end():
    places = edges(TEXT).nonzero()[0].tolist()
    assert [TEXT[a:b] for a, b in zip([0, *places], [*places, None], strict=True)] == [
        *(b"def", b" ", b"f", b"(", b"x", b"):", b"\n  ", b"return", b" ", b"x_1"),
    ]
    assert not edges("é".encode()).any() and not edges(b"").size


def cut(*starts):
    ends = [*starts[1:], len(TEXT)]
    return Spans("", tuple(Span(a, b) for a, b in zip(starts, ends, strict=True)))


def test_shares_are_of_boundaries_and_chance_is_of_places():
    """Of two texts; what begins a text was not cut."""
    found = shares(lambda text: Annotation((cut(0, 3, 4, 11), cut(0, 5, 9))), [TEXT, TEXT])
    assert found["bytes"] == 2 * 22 and found["chance"] == pytest.approx(9 / 21)
    assert found["stages"] == {
        "stage 1": {"at_edges": 2 / 3, "boundaries": 6, "bytes_per_chunk": 22 / 4},
        "stage 2": {"at_edges": 1.0, "boundaries": 4, "bytes_per_chunk": 22 / 3},
    }


@pytest.mark.parametrize("type_", ["hnet", "hnet_x_nsa"])
def test_every_stage_of_a_hierarchy_has_its_share(type_):
    two = {
        "hnet": (
            'arch_layout=["m1",["m1",["T1"],"m1"],"m1"]',
            "n_layers=null",
            "num_compression_layers=null",
        ),
        "hnet_x_nsa": ("n_compress_decompress_layers=2",),
    }
    adapter = adapter_of(type_, *(f"model_cfg.{word}" for word in two[type_]))
    move_away_from_uniform(adapter.eval(), std=0.1)
    with torch.no_grad():
        found = shares(adapter.annotate, [TEXT])["stages"]
    assert list(found) == ["stage 1", "stage 2"]
    assert found["stage 1"]["boundaries"] > found["stage 2"]["boundaries"] > 0
