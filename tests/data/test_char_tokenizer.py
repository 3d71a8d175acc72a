"""Characters: those of the training text, single bytes for all others, without loss."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import data.char as char_module
from data import load_dataset
from data.char import CharTokenizer
from data.corpus import Document
from data.errors import DataError
from data.tokenizer_choice import choose, vocabulary_size
from data.tokenizers import load_tokenizer

KNOWN = "a é € 漢 𝄞 \u2028"
OTHERS = "ü→字😀"


@pytest.fixture(scope="module")
def char() -> CharTokenizer:
    return CharTokenizer.train([Document("a", KNOWN[4:].encode()), Document("b", KNOWN[:4].encode())])


def plain(text: bytes, known: str) -> list[int]:
    """A restatement, one character after the other."""
    order = sorted({character for character in known if character > "\x7f"})
    ids = []
    for character in text.decode("utf-8", "surrogateescape"):
        single = character.encode("utf-8", "surrogateescape")
        ids += [256 + order.index(character)] if character in order else list(single)
    return ids


@given(raw=st.binary(max_size=40) | st.text(KNOWN + OTHERS, max_size=30).map(str.encode))
@example(raw=b"caf\xc3\xa9 \xff\xc3 \xed\xa0\x80 \xe6\xbc\xa2\xe2\x82")
@settings(deadline=None, max_examples=150)
def test_ids_are_those_of_the_definition_and_the_text_comes_back(char: CharTokenizer, raw: bytes) -> None:
    ids = char.encode(raw)
    assert ids.tolist() == plain(raw, KNOWN) and ids.dtype == char.dtype
    assert char.decode(ids) == raw and int(char.token_bytes[ids].sum()) == len(raw)


def test_vocabulary(char: CharTokenizer) -> None:
    beyond = sorted(c for c in KNOWN if c > "\x7f")
    assert char.vocab_size == 256 + len(beyond) + 1 == char.eot + 1 and char.name == "char"
    assert [char.decode([256 + n]).decode() for n in range(len(beyond))] == beyond
    for raw in (b"only ASCII\n", b"and a byte that is none \xff", b""):
        assert CharTokenizer.train([Document("a", raw)]).vocab_size == 257
    assert CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))).dtype == np.uint16


def test_pieces_of_long_texts_change_nothing(char: CharTokenizer, monkeypatch) -> None:
    raw = (KNOWN + OTHERS).encode() * 50 + b"\xff\xfe"
    whole = char.encode(raw)
    monkeypatch.setattr(char_module, "PIECE_BYTES", 7)
    assert (char.encode(raw) == whole).all()
    assert CharTokenizer.train([Document("a", KNOWN.encode() * 9)]).digest == char.digest


def test_saved_and_loaded(char: CharTokenizer, tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    char.save(path)
    loaded = load_tokenizer(path)
    assert loaded.digest == char.digest and loaded.encode(KNOWN).tolist() == char.encode(KNOWN).tolist()
    content = json.loads(path.read_text())
    for changes, reason in (
        ({"characters": None}, "characters must be a string"),
        ({"characters": char.characters[::-1]}, "in the order of Unicode"),
        ({"characters": "a" + char.characters}, "beyond ASCII"),
        ({"characters": "\ud800"}, "beyond ASCII"),
        ({"characters": char.characters[1:]}, "special_tokens must be"),
        ({"characters": "è" + char.characters[1:]}, "does not match its digest"),
    ):
        path.write_text(json.dumps({**content, **changes}))
        with pytest.raises(DataError, match=reason):
            load_tokenizer(path)


@given(text=st.text(KNOWN + OTHERS, max_size=30))
@settings(deadline=None, max_examples=50)
def test_in_the_form_of_hugging_face(char: CharTokenizer, text: str) -> None:
    theirs = Tokenizer.from_str(json.dumps(char.to_huggingface()))
    theirs.encode_special_tokens = True
    ids = theirs.encode(text).ids
    assert ids == char.encode(text).tolist() and theirs.decode(ids) == text


def test_a_run_knows_the_characters_of_its_training_text_alone(config, tmp_path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("the caf\u00e9 sat on a mat\n" * 60 + "\u2192 held out \u2192\n", encoding="utf-8")
    cfg = config(input_file=str(path), tokenizer="char")
    first = load_dataset(cfg, cache_dir=tmp_path / "cache")
    assert first.tokenizer.characters == "\u00e9"
    assert b"".join(first.heldout.text(i) for i in range(first.heldout.n_docs)).endswith("\u2192\n".encode())
    path.write_text("the caf\u00e8 sat on a mat\n" * 60, encoding="utf-8")
    assert load_dataset(cfg, cache_dir=tmp_path / "cache").tokenizer.characters == "\u00e8"


def test_its_size_is_not_asked_for_before_there_is_a_text(config) -> None:
    assert choose(config(tokenizer="char"))[0].size is None
    with pytest.raises(DataError, match="say how many with --vocab_size"):
        vocabulary_size(config(tokenizer="char"))
    with pytest.raises(DataError, match=r"'chars' is not one of .*Did you mean 'char'"):
        choose(config(tokenizer="chars"))
    with pytest.raises(DataError, match="'char-300' is not one of"):
        choose(config(tokenizer="char-300"))
    with pytest.raises(DataError, match="this architecture reads bytes"):
        choose(config(tokenizer="char"), "byte")
