"""Standard output and error, whatever is at their other end."""

import io
import os
import sys

import pytest

from trainer.view.stream import PatientStream, of_our_own, patient, patient_streams


class Left(io.StringIO):
    """A pipe whose reader has left after so many writes."""

    encoding = "utf-8"

    def __init__(self, after: int = 0, error: type[OSError] = BrokenPipeError) -> None:
        super().__init__()
        self.left, self.error = after, error

    def write(self, text: str) -> int:
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().write(text)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", rb"\xb1 \u2591 \xff"),
        ("cp1252", b"\xb1 \\u2591 \xff"),
        ("utf-8", "± ░ ÿ".encode()),
    ],
)
def test_any_text_goes_to_any_encoding(encoding, expected):
    raw = io.BytesIO()
    stream = patient(io.TextIOWrapper(raw, encoding=encoding))
    print("± ░ ÿ", end="", file=stream, flush=True)
    assert raw.getvalue() == expected


def test_bytes_of_an_argument_that_are_no_text_are_printed_as_escapes():
    raw = io.BytesIO()
    stream = patient(io.TextIOWrapper(raw, encoding="utf-8"))
    print(os.fsdecode(b"a\xff"), file=stream, flush=True)
    assert raw.getvalue() == b"a\\udcff\n"


@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
def test_a_reader_that_has_left_silences_the_stream(error):
    inner = Left(after=2, error=error)
    stream = patient(inner)
    for number in range(4):
        print(number, file=stream, flush=True)
    assert inner.getvalue() == "0\n"


def test_a_writer_that_wants_to_know_is_told():
    with pytest.raises(BrokenPipeError):
        print("text", file=patient(Left(), raises=True))
    print("text", file=patient(Left(error=OSError), raises=True))  # a terminal that was closed, a full disk


def test_a_pipe_without_a_reader_goes_nowhere_from_then_on():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as pipe:
        print("text", file=patient(pipe), flush=True)
        os.write(writer, b"what a library writes")  # no BrokenPipeError
        assert os.get_inheritable(writer), "and so for child processes"


def test_patient_once_is_enough():
    stream = patient(io.StringIO())
    assert patient(stream) is stream and isinstance(stream, PatientStream)


def test_a_stream_that_was_closed_before_python_started(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", Left())
    with patient_streams(raises=True):
        print("text")
        print("text", file=sys.stderr)
        assert not sys.stdout.isatty()
    assert sys.stdout is None


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2Ja\rb\x08\x7f\x00", r"\x9b2Ja\rb\x08\x7f\x00"),
        ("abc\u202ecba\u2066", r"abc\u202ecba\u2066"),
        ("a\tb\nc é 漢 👩\u200d💻 \xa0", "a\tb\nc é 漢 👩\u200d💻 \xa0"),
    ],
)
def test_a_terminal_shows_what_it_would_obey(text, shown):
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        print(text, end="", file=patient(stream))
    assert (terminal.getvalue(), pipe.getvalue()) == (shown, text)


def test_commands_cannot_be_put_together_of_pieces():
    """As text comes while it is generated."""
    terminal = Terminal()
    for piece in ("\x1b", "[", "2J"):
        patient(terminal).write(piece)
    assert terminal.getvalue() == r"\x1b[2J"


def test_our_own_commands_are_obeyed():
    terminal = Terminal()
    of_our_own(patient(terminal)).write("\r\x1b[J")
    assert terminal.getvalue() == "\r\x1b[J"
