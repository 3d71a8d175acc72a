"""The console: plain when piped, one line rewritten on a terminal, nothing on other ranks."""

import io
import re
import sys
import time

import pytest

from trainer.view.console import Console, step_line
from trainer.view.format import duration, printable, quantity

STEP = {
    "step": 20,
    "total_steps": 1750,
    "loss": 5.1234567,
    "bits_per_byte": 3.21,
    "tokens_per_second": 12345.6,
    "eta_seconds": 3723.0,
    "lr/embedding": 1e-3,
    "lr/matrix": 2e-2,
}
SCORE = {"bits_per_byte": 1.985, "kind": "exact", "standard_error": 0.0, "comparable": True}
YARDSTICKS = {"uniform": 8.0, "unigram": 3.1, "3-gram": 2.65, "6-gram": 1.91, "xz": 1.55, "bz2": 1.6}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def plain(**options) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(stream=stream, **options), stream


def everything(console: Console) -> None:
    console.banner(["gpt2 · 2,000,000 parameters", "data embedded"])
    console.note("a note")
    console.warn("a warning")
    console.step(STEP)
    console.evaluation({"step": 20, "val_bits_per_byte": 2.5, "val_kind": "exact", "val_perplexity": 99.5})
    console.step(STEP | {"step": 30})
    console.score_table(SCORE, YARDSTICKS)
    console.sample("def f(x):\n\treturn x")
    with console.doing("something"):
        pass
    console.finish("outputs/run", ["python mytrainer.py generate --checkpoint outputs/run " + "x" * 90])
    console.close()


# --- the step line ------------------------------------------------------------------------------------


def test_step_line():
    line = "  20/1750  loss  5.123  bits/byte 3.210  12.3k tok/s  lr 2.0e-02   1h02m left"
    assert step_line(STEP, 80) == line


def test_step_line_keeps_its_width_and_fits():
    extreme = {"step": 1750, "loss": 10.9, "tokens_per_second": 999.9, "eta_seconds": 0, "bits_per_byte": 0.9}
    lengths = {len(step_line(STEP | change, 80)) for change in ({}, extreme, {"tokens_per_second": 1.2e6})}
    assert len(lengths) == 1
    assert lengths.pop() <= 80
    for total in (10, 1750, 100_000, 1_000_000):
        assert len(step_line(STEP | {"total_steps": total, "mfu": 0.412}, 80)) <= 80


def test_what_does_not_fit_goes_in_order():
    with_mfu = STEP | {"mfu": 0.412}
    assert "mfu 41.2%" in step_line(with_mfu, 80)
    assert "lr" not in step_line(with_mfu, 80)
    assert "lr 2.0e-02" in step_line(with_mfu, 100)
    assert "tok/s" not in step_line(with_mfu, 60)
    assert "mfu" not in step_line(STEP, 200)


def test_metrics_that_an_adapter_asks_for():
    line = step_line(STEP | {"depth": 12.34567}, 100, ["depth", "load"])
    assert "bits/byte 3.210  depth      12.35  load          -  12.3k tok/s" in line
    lengths = {len(step_line(STEP | {"depth": value}, 120, ["depth"])) for value in (0.0, -1.23456e-7, 1e20)}
    assert len(lengths) == 1
    narrow = step_line(STEP | {"depth": 12.3}, 72, ["depth", "load"])
    assert "depth" in narrow and "load" not in narrow and "tok/s" not in narrow


def test_non_finite_numbers_do_not_break_the_line():
    line = step_line(STEP | {"loss": float("nan"), "eta_seconds": float("inf"), "mfu": None}, 80)
    assert "loss    nan" in line
    assert line.endswith("     ? left")


# --- plain output -------------------------------------------------------------------------------------


def test_piped_output_has_no_escape_codes_and_a_line_per_step():
    console, stream = plain()
    everything(console)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert len(re.findall(r"^ +[23]0/1750  loss", text, flags=re.M)) == 2
    assert "warning: a warning\n" in text
    assert "step 20  held out 2.500 bits/byte  perplexity 99.50 per token\n" in text
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("  python"))
    assert any(line.endswith("x" * 90) for line in text.splitlines())


def test_other_ranks_print_nothing():
    for stream in (io.StringIO(), Terminal()):
        everything(Console(enabled=False, stream=stream))
        assert stream.getvalue() == ""


def test_bound_is_printed_as_such():
    console, stream = plain()
    console.evaluation(
        {"step": 5, "val_bits_per_byte": 1.2345, "val_kind": "bound", "val_standard_error": 0.01}
    )
    assert "held out <= 1.234 ± 0.010 bits/byte" in stream.getvalue()


def test_stream_that_is_not_utf8():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(stream=stream)
    console.note("gpt2 · é")
    console.sample("λ")
    assert raw.getvalue() == b"gpt2 \\xb7 \\xe9\n\nsample\n  \\u03bb\n"


def test_what_takes_long_says_so_and_again(monkeypatch):
    monkeypatch.setattr("trainer.view.console.FIRST_WORD", 0.01)
    console, stream = plain()

    def wait_for(text):
        deadline = time.monotonic() + 10
        while text not in stream.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    with console.doing("reading the text") as now:
        wait_for("reading the text ... 0s\n")
        now("training the tokenizer")
        wait_for("training the tokenizer ... 0s\n")
    said = stream.getvalue()
    with console.doing("nothing"):
        pass
    time.sleep(0.03)
    assert stream.getvalue() == said


def test_what_shows_by_itself_is_not_told(monkeypatch):
    monkeypatch.setattr("trainer.view.console.FIRST_WORD", 0.01)
    console, stream = plain()
    with console.doing(""):
        time.sleep(0.05)
    assert stream.getvalue() == ""


def test_progress_of_other_work_is_one_line_too(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console, stream = plain()
    for line in ("10 %", "20 %"):
        console.progress(line)
    assert stream.getvalue() == "10 %\n20 %\n" and not console.is_live
    terminal = Terminal()
    console = Console(stream=terminal)
    assert console.is_live
    for line in ("10 %", "20 %"):
        console.progress(line)
    console.close()
    console.note("done")
    shown = terminal.getvalue()
    assert shown.index("10 %") < shown.index("20 %") < shown.index("done") and "10 %\n" not in shown
    console, stream = plain(enabled=False)
    console.progress("10 %")
    assert stream.getvalue() == ""


# --- the score ----------------------------------------------------------------------------------------


def table(score, yardsticks=YARDSTICKS):
    console, stream = plain()
    console.score_table(score, yardsticks)
    return stream.getvalue().splitlines()[2:]


def test_score_table_is_sorted_with_ours_marked():
    assert table(SCORE) == [
        "  xz             1.550  sees the whole file",
        "  bz2            1.600  sees the whole file",
        "  6-gram         1.910  bytes, Witten-Bell",
        "> this model     1.985",
        "  3-gram         2.650  bytes, Witten-Bell",
        "  unigram        3.100  token frequencies",
        "  uniform        8.000  every byte equally likely",
    ]


def test_score_table_of_a_bound():
    lines = table(SCORE | {"kind": "bound", "standard_error": 0.004, "estimator": "ELBO"}, {"uniform": 8.0})
    assert lines[0] == "> this model  <= 1.985 ± 0.004"
    assert lines[1].startswith("  uniform        8.000")
    assert lines[2] == "  an upper bound (ELBO): the model may be better"


def test_score_table_says_what_would_mislead():
    lines = table(SCORE | {"comparable": False}, {"6-gram": 1.9, "ngram_training_bytes": 32_000_000})
    assert len(lines) == 4
    assert "not comparable" in lines[2]
    assert "trained on 32.0MB" in lines[3]
    lines = table(SCORE | {"comparable": False, "lossy_documents": 2, "documents": 9}, {})
    assert len(lines) == 2 and "of 2 of 9 documents the tokens do not give the text back" in lines[1]


# --- samples ------------------------------------------------------------------------------------------


def test_sample_cannot_control_the_terminal():
    console, stream = plain()
    console.sample("a\x1b[2Jb\x07\rc\u202ed\n" + "word " * 30)
    text = stream.getvalue()
    assert r"  a\x1b[2Jb\x07\rc\u202ed" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
    assert max(map(len, text.splitlines())) <= 80


def test_printable_bytes():
    assert printable(b"ok\tx\xff\xc3\xa9\n") == "ok  x\\xffé\n"


# --- the terminal -------------------------------------------------------------------------------------


def test_terminal_rewrites_one_line_and_gives_the_cursor_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    everything(Console(stream=stream))
    text = stream.getvalue()
    assert "\x1b[2K" in text  # the line is erased and written again
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden and shown
    assert text.index("\x1b[?25h") < text.index("bits per byte of the held-out")
    assert "\x1b[1m" in text


def test_no_color(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    everything(Console(stream=stream))
    assert not re.search(r"\x1b\[(3|4)\dm", stream.getvalue())


def test_dumb_terminal_is_plain(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    everything(Console(stream=stream))
    assert "\x1b" not in stream.getvalue()


# --- numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (86399, "23h59m"),
        (1e5, "1d03h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999.4, "999"),
        (999.7, "1.00k"),
        (9999, "10.0k"),
        (99950, "100k"),
        (999_600, "1.00M"),
        (5.6e12, "5.60T"),
    ],
)
def test_quantity(value, text):
    assert quantity(value) == text
    assert len(text) <= 5


def test_a_terminal_obeys_nothing_of_what_is_printed(monkeypatch):
    """Also of what others print while there is a line that is rewritten."""
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    console = Console(stream=terminal)
    assert console.is_live
    bad = "\x1bc\x1b]0;evil\x07"
    console.note(bad)
    console.progress(bad)
    print(bad)
    print(bad, file=sys.stdout)
    console.warn(bad)
    console.close()
    written = terminal.getvalue()
    assert written.count(r"\x1bc\x1b]0;evil\x07") >= 4 and "\x1bc" not in written and "\x1b]" not in written
    assert sys.stdout is terminal
