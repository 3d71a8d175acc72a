"""What an adapter may say of a text to be drawn, and what it is told where that is none."""

import pytest
import torch

from adapters.base import Annotation, Map, Span, Spans


def spans(*places):
    return Spans("stage 1", tuple(Span(start, end) for start, end in places))


def test_spans_by_token_leave_out_those_without_a_label():
    assert Spans.by_token("x", ["a", None, ""]).spans == (Span(0, 1, "a"), Span(2, 3, ""))


@pytest.mark.parametrize("places", [[(0, 2), (1, 3)], [(2, 3), (0, 1)], [(1, 1)], [(-1, 2)], [(3, 2)]])
def test_spans_that_overlap_or_are_none_are_refused(places):
    with pytest.raises(ValueError, match="stage 1: a span goes from"):
        spans(*places)


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (torch.ones(3), {}, r"must be \(R, C\), got \(3,\)"),
        (torch.ones(0, 3), {}, r"must be \(R, C\), got \(0, 3\)"),
        (torch.tensor([[1.0, torch.nan]]), {}, "must be finite and not negative"),
        (torch.tensor([[1.0, torch.inf]]), {}, "must be finite and not negative"),
        (torch.tensor([[1, -1]]), {}, "must be finite and not negative"),
        (torch.ones(2, 3), {"row_labels": ("a",)}, "1 row_labels for 2 rows; give 2"),
        (torch.ones(2, 3), {"column_labels": ("a",) * 4}, "4 column_labels for 3 columns; give 3"),
    ],
)
def test_values_that_are_no_map_are_refused(values, labels, message):
    with pytest.raises(ValueError, match=f"layer 3: .*{message}"):
        Map("layer 3", values, "expert", "token", **labels)


def test_an_annotation_is_of_one_text():
    own = Map("own", torch.ones(2, 3, dtype=torch.bool), "expert", "token", row_labels=("a", "b"))
    found = Annotation((spans((0, 1), (1, 3)),), (own,))
    found.check(3)
    with pytest.raises(ValueError, match="stage 1: a span ends at 3, and the text has 2 tokens"):
        Annotation(found.spans).check(2)
    with pytest.raises(ValueError, match=r"own: 3 columns are not the 4 tokens.*have column_labels"):
        found.check(4)
    assert found and Annotation(maps=(own,)) and not Annotation()
    Annotation((spans(),)).check(0)
