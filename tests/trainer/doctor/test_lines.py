"""Whatever is broken, a line says so."""

import pytest

from trainer.doctor.lines import lines_of, note, ok, size, tried


def test_what_was_seen_before_a_failure_stays():
    def look():
        yield ok("first", "there")
        raise KeyError("gone")

    first, failed = tried("section", look)
    assert first == ok("first", "there")
    assert (failed.state, failed.about) == ("problem", "section")
    assert "cannot be looked at: KeyError: 'gone' (test_lines.py:" in failed.text and failed.remedy


def test_one_line_is_as_good_as_several():
    assert list(tried("a", lambda more: note("a", more), "b")) == [note("a", "b")]


@pytest.mark.parametrize(
    "error", [SystemExit(3), ImportError("no module"), RecursionError(), SyntaxError("x")]
)
def test_nothing_gets_through(error):
    def look():
        raise error

    (line,) = tried("section", look)
    assert line.state == "problem"
    assert ("pip install -e ." in line.remedy) == isinstance(error, ImportError)


def test_a_section_that_cannot_be_imported():
    (line,) = lines_of("kernels", "trainer.doctor.nothing:check")
    assert line.state == "problem" and line.about == "kernels"


@pytest.mark.parametrize(
    "count, said", [(0, "0 B"), (999, "999 B"), (2048, "2.0 kB"), (1.5e9, "1.5 GB"), (4.2e13, "42 TB")]
)
def test_sizes(count, said):
    assert size(count) == said
