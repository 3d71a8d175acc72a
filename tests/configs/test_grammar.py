"""What we print for people to type means what it says when it comes back."""

import shlex

import pytest

from configs.frontend import parse
from configs.grammar import entries, in_quotes, word


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "my run",
        "a,b",
        "it's",
        'say "hi"',
        "x=1",
        "[1",
        "{a: 1}",
        "12",
        "null!",
        "~x",
        "choice(1,2)",
        "é",
    ],
)
def test_a_printed_word_comes_back(text):
    (typed,) = shlex.split(in_quotes("sample_prompt", text))
    request = parse([typed])
    assert not request.sweeps and request.values["sample_prompt"] == text
    assert typed == word("sample_prompt", text)


def test_what_needs_no_quotes_has_none():
    assert in_quotes("resume", "outputs/gpt2-20261121-3fa2") == "resume=outputs/gpt2-20261121-3fa2"


def test_entries_of_a_mapping_are_written_as_they_were_meant():
    found = entries("env", "{A: 1, B: x y, C: '1', D: [a, null]}")
    assert found is not None and dict(found) == {"A": "1", "B": "x\\ y", "C": "'1'", "D": "[a,null]"}
    assert entries("env", "3") is None
