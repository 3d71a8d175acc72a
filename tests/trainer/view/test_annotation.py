"""What is drawn of a text: marks and maps, whatever the text is."""

import json
import re

import pytest

from tests.trainer.view.test_report import Page
from trainer.view.annotation import MAX_DRAWN, drawn
from trainer.view.report import write_picture

HOSTILE = "<b>&\"'\0\x1b[2J</b> gr\N{LATIN SMALL LETTER O WITH DIAERESIS}\n"


def of_bytes(text, **found):
    """By byte, so that characters are cut too."""
    return {
        "text": text,
        "tokens": [[i, i + 1] for i in range(len(text.encode()))],
        "spans": [],
        "maps": [],
        **found,
    }


def marked(text, *spans, name="layer 0"):
    return of_bytes(text, spans=[{"name": name, "spans": [list(span) for span in spans]}])


def mapped(values, text="ab", **more):
    one = {"name": "of", "rows": "expert", "columns": "token", "row_labels": None, "column_labels": None}
    return of_bytes(text, maps=[{**one, "values": values, **more}])


def marks(html):
    return re.findall(r'<mark class="(.*?)"(?: title="(.*?)")?>(.*?)</mark>', html.partition("<pre")[2], re.S)


def cells(html):
    """Level -> cells (row, column) that are drawn of it."""
    found = {}
    for opacity, path in re.findall(r'fill-opacity="(.*?)" d="(.*?)"', html):
        for c, r, n, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h(-\d+)z", path):
            assert int(back) == -int(n)
            found.setdefault(float(opacity), set()).update((int(r), int(c) + i) for i in range(int(n)))
    return found


def test_nothing_is_drawn_of_nothing():
    assert drawn({}) == ""


def test_stretches_are_marked_where_they_lie_and_the_rest_stays():
    html = drawn(marked("one two", (0, 3, ""), (3, 4, ""), (5, 7, "")))
    assert marks(html) == [("s0", "", "one"), ("s1", "", " "), ("s0", "", "wo")]
    assert Page(html).text.endswith("one two")
    assert "3 marked, 86% of the bytes" in html


def test_equal_labels_look_alike_and_others_do_not():
    html = drawn(marked("abcd", (0, 1, "10"), (1, 2, "9"), (2, 3, "10"), (3, 4, "2")))
    styles = {label: style for style, label, _ in marks(html)}
    assert styles == {"2": "s0", "9": "s1", "10": "s2"}, "in the order of numbers"
    assert [label for _, label, _ in marks(html)] == ["10", "9", "10", "2"]
    legend = re.findall(r"<span><mark[^>]*>(.*?)</mark></span>", html)
    assert legend == ["2", "9", "10"]


def test_many_labels_are_written_too():
    few, many = (drawn(marked("x" * n, *((i, i + 1, str(i)) for i in range(n)))) for n in (18, 19))
    assert len({style for style, _, _ in marks(few)}) == 18 and "<sup>" not in few
    assert many.count("<sup>") == 19 and "<sup>18</sup>x" in many


@pytest.mark.parametrize("cut", range(1, len(HOSTILE.encode())))
def test_a_text_is_escaped_wherever_it_is_cut(cut):
    size = len(HOSTILE.encode())
    found = marked(HOSTILE, (0, cut, HOSTILE), (cut, size, ""), name=HOSTILE)
    found["maps"] = mapped([[1.0] * size, [0.0] * size], row_labels=[HOSTILE, "<"], name=HOSTILE)["maps"]
    html = drawn(found)
    page = Page(html)
    assert "b" not in {tag for tag, _ in page.tags} and "<b" not in html
    assert "\x1b" not in page.text and "\0" not in page.text
    (image,) = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert image["role"] == "img" and image["aria-label"].startswith("<b>&\"'\\x00\\x1b[2J</b>")


def test_the_end_of_a_line_can_be_seen_to_be_marked():
    assert marks(drawn(marked("a\n\nb", (0, 2, ""), (3, 4, "")))) == [("s0", "", "a↵\n"), ("s1", "", "b")]


def test_tokens_that_are_cut_characters_are_shown_as_bytes():
    html = drawn(marked("ö", (0, 1, ""), (1, 2, "")))
    assert [text for _, _, text in marks(html)] == [r"\xc3", r"\xb6"]


def test_a_map_is_darker_where_a_value_is_greater():
    html = drawn(mapped([[0.0, 0.0, 1.0, 1.0, 0.5], [0.5, 1e-9, 0.0, 0.0, 1.0]], "abcde"))
    assert cells(html) == {1.0: {(0, 2), (0, 3), (1, 4)}, 0.5: {(0, 4), (1, 0)}, 0.125: {(1, 1)}}
    assert "2 rows: expert; 5 columns: token; from 0 (empty) to 1 (full)" in html


def test_a_map_of_zeros_is_empty():
    assert cells(drawn(mapped([[0.0, 0.0]]))) == {}


def test_rows_and_columns_have_their_names_or_those_of_the_text():
    html = drawn(mapped([[1.0, 0.0]] * 2, "ab", row_labels=["first", "second and more of it"]))
    assert re.findall(r'<text class="y"[^>]*>(.*?)<', html) == ["first", "second and mo…"]
    assert re.findall(r'<text class="x"[^>]*>(.*?)<', html) == ["ab", "b"]


def test_the_page_s_script_is_given_all_names():
    names = [f"<{i}>'\"" for i in range(40)]
    page = Page(drawn(mapped([[1.0] * 3] * 40, "a'\n", row_labels=names)))
    (section,) = [attrs for tag, attrs in page.tags if tag == "section"]
    (image,) = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert json.loads(image["data-rows"]) == names and "data-columns" not in image
    assert json.loads(section["data-tokens"]) == ["a'↵", "'↵", "↵"]
    assert image["data-size"] == "40 3"
    alone = Page(drawn(marked("ab", (0, 1, ""))))
    assert [attrs for tag, attrs in alone.tags if tag == "section"] == [{}], "no names where no map is"


def test_names_have_room():
    html = drawn(mapped([[1.0] * 300 for _ in range(300)], "x" * 300))
    height = [float(y) for y in re.findall(r'<text class="y" x="[^"]*" y="(.*?)"', html)]
    width = [float(x) for x in re.findall(r'<text class="x" x="(.*?)"', html)]
    assert min(b - a for a, b in zip(height, height[1:], strict=False)) > 14.8  # rounded
    assert min(b - a for a, b in zip(width, width[1:], strict=False)) > 57.8


def test_of_many_some_are_drawn_first_and_last_among_them():
    one = {"spans": [[0, 1, ""]]}
    html = drawn(of_bytes("ab", spans=[{"name": f"layer {i}", **one} for i in range(40)]))
    names = re.findall(r"<summary>layer (\d+)</summary>", html)
    assert len(set(names)) == MAX_DRAWN and names[0] == "0" and names[-1] == "39"
    assert f"{MAX_DRAWN} of 40 are drawn" in html and html.count("<details open>") == 1


def test_a_picture_is_a_page_of_its_own(tmp_path):
    write_picture(tmp_path / "page.html", "<x>", marked("{{SCRIPT}}", (0, 10, "")))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    Page(text)
    assert "<title>&lt;x&gt;</title>" in text and ">{{SCRIPT}}</mark>" in text
    assert not re.search(r"https?://|url\(|@import|fetch\(", text)
