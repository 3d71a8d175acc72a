"""Tokenizers of ours, and those that came from there, in the form of Hugging Face: equal ids, text for text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.bpe import BpeTokenizer
from data.corpus import Document
from data.huggingface.alphabet import ALPHABET, byte_string, spelled
from data.huggingface.folder import read_huggingface_tokenizer
from data.huggingface.written import huggingface_files, merges_of
from data.tokenizers import END_OF_TEXT, ByteTokenizer, TableTokenizer
from tests.data.foreign import byte_level, llama, saved, word_piece

GROUPS = st.sampled_from(
    ["  ", "\n", "\t", "\r\n", "ab", "the cat", "12345", "don't", "é", "𝄞", "_=", "\u2028", "x"]
)
TEXTS = st.text(max_size=40) | st.lists(GROUPS, max_size=20).map("".join)


@pytest.fixture(scope="module")
def ours(bpe: BpeTokenizer) -> dict[str, tuple[TableTokenizer, Tokenizer]]:
    # Words of few letters, so that tokens overlap and one can be merged in several ways.
    runs = BpeTokenizer.train([Document("runs", b"aaaa aaaaab abab  ababa\n\n\n  aab" * 30)], 264)
    kinds: dict[str, TableTokenizer] = {"byte": ByteTokenizer(), "bpe": bpe, "runs": runs}
    found = {
        name: (kind, Tokenizer.from_str(json.dumps(kind.to_huggingface()))) for name, kind in kinds.items()
    }
    for _, theirs in found.values():
        theirs.encode_special_tokens = True
    return found


@pytest.mark.parametrize("name", ["byte", "bpe", "runs"])
@given(text=TEXTS | st.text("ab \n", max_size=60))
@example(text=f"{END_OF_TEXT}   \n\n\n    def f():")
@settings(deadline=None, max_examples=80)
def test_ids_are_equal_and_text_comes_back(ours, name: str, text: str) -> None:
    mine, theirs = ours[name]
    ids = theirs.encode(text).ids
    assert ids == mine.encode(text).tolist()
    assert theirs.decode(ids) == text and mine.decode(ids) == text.encode()


def test_ids_of_source_code_are_equal(ours) -> None:
    mine, theirs = ours["bpe"]
    for module in (json, os):
        source = Path(module.__file__).read_text(encoding="utf-8")
        assert theirs.encode(source).ids == mine.encode(source).tolist()


def test_every_way_to_merge_a_token_is_there_and_the_earliest_token_first() -> None:
    tokens = [b"a", b"b", b"aa", b"aab", b"ab"]
    assert merges_of(tokens) == [(b"a", b"a"), (b"a", b"ab"), (b"aa", b"b"), (b"a", b"b")]


def test_the_alphabet_is_that_of_the_library() -> None:
    assert sorted(ALPHABET) == sorted(byte_level().pre_tokenizer.alphabet())
    assert (spelled(b" a\n"), byte_string("Ġa"), byte_string("a b")) == ("Ġa\u010a", b" a", b"a b")


def write(folder: Path, tokenizer, config) -> Path:
    """A folder as an export leaves it."""
    folder.mkdir()
    files = huggingface_files(tokenizer, 128)
    assert files is not None
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", ["GPT2Config", "LlamaConfig"])
def test_transformers_opens_them_beside_a_model(tmp_path, bpe: BpeTokenizer, model: str) -> None:
    import transformers

    for mine in (ByteTokenizer(), bpe):
        ends = {"bos_token_id": mine.eot, "eos_token_id": mine.eot}
        config = getattr(transformers, model)(vocab_size=mine.vocab_size, **ends)
        folder = write(tmp_path / mine.name, mine, config)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in ("the cat\n\n  é 𝄞 12345 don't , ok . ", "  two blanks", ""):
            assert theirs(text)["input_ids"] == mine.encode(text).tolist()
            assert theirs.decode(mine.encode(text)) == text
        assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (
            mine.eot,
            mine.eot,
            mine.vocab_size,
        )
        assert theirs.model_max_length == 128
        back = read_huggingface_tokenizer(folder, mine.vocab_size)
        assert (back.eot, back.ends, back.token_bytes.tolist()) == (
            mine.eot,
            mine.ends,
            mine.token_bytes.tolist(),
        )
        assert (back.encode(b"the cat \xff 12345") == mine.encode(b"the cat \xff 12345")).all()


@pytest.mark.parametrize("make", [byte_level, llama, word_piece])
def test_foreign_ones_go_out_as_they_came(tmp_path, make) -> None:
    import transformers

    roles = {
        byte_level: ("<|endoftext|>", "<|im_start|>"),
        llama: ("<s>", "</s>"),
        word_piece: ("[CLS]", "[SEP]"),
    }
    bos, eos = roles[make]
    said = {
        "bos_token": bos,
        "eos_token": {"content": eos},
        "chat_template": "{{ messages }}",
        "auto_map": {"x": "y"},
    }
    said |= {"tokenizer_class": "LlamaTokenizer", "additional_special_tokens": [{"content": eos}]}
    folder = saved(tmp_path / "in", make(), tokenizer_config=said)
    tokenizer = read_huggingface_tokenizer(folder)
    out = write(tmp_path / "out", tokenizer, transformers.LlamaConfig(vocab_size=tokenizer.vocab_size))
    assert json.loads((out / "tokenizer.json").read_text()) == json.loads(
        (folder / "tokenizer.json").read_text()
    )
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}" and "auto_map" not in config
    assert config["additional_special_tokens"] == [eos]
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert (theirs.bos_token, theirs.eos_token) == (bos, eos)
    ids = tokenizer.encode("hello world, the cat")
    assert theirs("hello world, the cat", add_special_tokens=False)["input_ids"] == ids.tolist()
    again = read_huggingface_tokenizer(out)
    assert (again.eot, again.ends, again.special_tokens) == (
        tokenizer.eot,
        tokenizer.ends,
        tokenizer.special_tokens,
    )


def test_other_kinds_have_no_such_form() -> None:
    assert huggingface_files(TableTokenizer.__new__(Nothing), 8) is None


class Nothing(TableTokenizer):
    """A kind from elsewhere."""

    kind = "nothing"
