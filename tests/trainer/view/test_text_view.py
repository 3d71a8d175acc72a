"""Gaps in a typed text, and the terminal's view of a text that is being resolved."""

import io
import json

import pytest

from data.huggingface.tokenizer import HuggingFaceTokenizer
from data.tokenizers import ByteTokenizer, text_of
from tests.data.foreign import llama
from trainer.view.text_view import UNDECIDED, TextView, with_gaps, wrap

BYTES = ByteTokenizer()


def test_gaps_become_undecided_tokens():
    assert with_gaps("a____b____", BYTES, 2) == [97, None, None, 98, None, None]
    with pytest.raises(ValueError, match="no gap"):
        with_gaps("ab", BYTES, 2)
    with pytest.raises(ValueError, match="gap_tokens"):
        with_gaps("a____", BYTES, 0)


def test_gaps_from_a_file(tmp_path):
    path = tmp_path / "text"
    path.write_text("x____")
    assert with_gaps(str(path), BYTES, 1) == [120, None]


def test_a_frame_is_drawn_over_the_last_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "5")
    monkeypatch.setenv("LINES", "10")
    monkeypatch.setattr("trainer.view.text_view.SECONDS_PER_FRAME", 0.0)
    stream = io.StringIO()
    view = TextView(BYTES, stream)
    view.show([97, None, None, 98, 10, 99])
    assert stream.getvalue() == f"a{UNDECIDED * 2}b\nc"
    view.show([97, 97, 97, 98, 10, 99])
    assert stream.getvalue().endswith("\r\x1b[1A\x1b[Jaaab\nc")
    view.wipe()
    assert stream.getvalue().endswith("\x1b[J") and view.lines == 0


def test_only_what_fits_is_drawn(monkeypatch):
    monkeypatch.setenv("COLUMNS", "3")
    monkeypatch.setenv("LINES", "4")
    stream = io.StringIO()
    view = TextView(BYTES, stream)
    view.show(list(b"aabbccdd"))
    assert stream.getvalue() == "cc\ndd" and view.lines == 2


def test_control_characters_and_half_characters_are_harmless():
    view = TextView(BYTES, io.StringIO())
    assert view.render([27, 0xC3, None, 0xA4]) == " \ufffd" + UNDECIDED + "\ufffd"
    assert wrap("", 4) == [""] and wrap("abcde", 2) == ["ab", "cd", "e"]


def test_a_blank_that_the_tokenizer_puts_in_front_is_seen_nowhere():
    tokenizer = HuggingFaceTokenizer(json.loads(llama().to_str()), 1, [2], {})
    view = TextView(tokenizer, io.StringIO())
    ids = tokenizer.encode("hello cat").tolist()
    assert view.render([*ids, None]) == f"hello cat{UNDECIDED}"
    assert view.render([None, *ids]) == f"{UNDECIDED} hello cat"
    gaps = with_gaps("hello____cat", tokenizer, 1)
    place = gaps.index(None)
    assert (text_of(tokenizer, gaps[:place]), tokenizer.decode(gaps[place + 1 :])) == (b"hello", b"cat")
