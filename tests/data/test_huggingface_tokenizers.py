"""Tokenizers of Hugging Face: the ids that their library gives, text for text, and which token starts a document."""

from __future__ import annotations

import copy
import json
import re
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from data import TOKENIZERS, load_dataset
from data.errors import DataError
from data.huggingface import tokenizer as tokenizer_module
from data.huggingface.folder import read_huggingface_tokenizer
from data.huggingface.tokenizer import HuggingFaceTokenizer, pieces
from data.tokenizer_choice import _parse, vocabulary_size
from data.tokenizers import StreamDecoder, as_bytes, load_tokenizer, text_of
from tests.data.foreign import LINES, byte_level, llama, saved, unigram, word_piece

MAKERS = {"byte level": byte_level, "llama": llama, "metaspace": lambda: llama(metaspace=True)}
LOSSY = {"unigram": unigram, "words": lambda: unigram(words=True), "word piece": word_piece}
ENDS = {
    "byte level": [0],
    "llama": [1, 2],
    "metaspace": [1, 2],
    "unigram": [1],
    "words": [1],
    "word piece": [1, 2],
}
TEXTS = ["hello world", "x\n\n  y\n", "", "naïve 𝄞 €", "a</s><s>b <|endoftext|>", *LINES[:3]]


@pytest.fixture(scope="module")
def foreign() -> dict[str, HuggingFaceTokenizer]:
    made = {name: json.loads(make().to_str()) for name, make in {**MAKERS, **LOSSY}.items()}
    return {
        name: HuggingFaceTokenizer(content, ENDS[name][0], ENDS[name], {}) for name, content in made.items()
    }


# -- text to ids and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MAKERS, *LOSSY])
def test_ids_are_those_of_the_library(foreign, name: str) -> None:
    ours = foreign[name]
    library = Tokenizer.from_str(json.dumps(ours.to_huggingface()))
    library.no_truncation()
    library.no_padding()
    for text in ("hello world", "rain fell  softly\n", "the cat\n    sat"):
        assert ours.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert ours.vocab_size == max(library.get_vocab().values()) + 1


texts = st.text(max_size=40) | st.text("ab <s>/|\n\u2581é", max_size=30)


@pytest.mark.parametrize("name", ["byte level", "llama"])
@given(raw=texts.map(str.encode) | st.binary(max_size=40))
@example(raw=b" caf\xc3\xa9 \xff\xc3 the cat\xe2\x82")
@settings(deadline=None, max_examples=60)
def test_byte_for_byte(foreign, name: str, raw: bytes) -> None:
    raw = raw.replace("▁".encode(), b"_") if name == "llama" else raw  # its letter for blanks
    tokenizer = foreign[name]
    ids = tokenizer.encode(raw)
    assert text_of(tokenizer, ids) == raw
    assert tokenizer.decode(tokenizer.encode_inside(raw)) == raw
    spans = tokenizer.spans(raw)
    assert b"".join(raw[start:stop] for start, stop in spans) == raw and len(spans) == len(ids)
    assert not set(ids.tolist()) & set(tokenizer.special_tokens.values())


@pytest.mark.parametrize("name", [*MAKERS, *LOSSY])
def test_text_never_becomes_a_special_token(foreign, name: str) -> None:
    tokenizer = foreign[name]
    assert tokenizer.special_tokens and set(tokenizer.special_tokens.values()) >= set(ENDS[name])
    for literal in tokenizer.special_tokens:
        ids = tokenizer.encode(f"a {literal} b{literal}")
        assert not set(ids.tolist()) & set(tokenizer.special_tokens.values())
        if name in MAKERS:
            assert text_of(tokenizer, ids) == f"a {literal} b{literal}".encode()
    assert tokenizer.decode([tokenizer.eot]) == b"" and tokenizer.token_bytes[tokenizer.eot] == 0


def test_added_tokens_that_are_not_special_are_text() -> None:
    library = byte_level()
    library.add_tokens(["<tool> é"])
    tokenizer = HuggingFaceTokenizer(json.loads(library.to_str()), 0, [0], {})
    ids = tokenizer.encode("a<tool> éb").tolist()
    assert ids[1] == library.token_to_id("<tool> é") and text_of(tokenizer, ids) == "a<tool> éb".encode()


def test_what_ends_a_text_is_special_even_if_the_file_does_not_say_so() -> None:
    library = byte_level()
    library.add_tokens(["<end>"])
    end = library.token_to_id("<end>")
    tokenizer = HuggingFaceTokenizer(json.loads(library.to_str()), 0, [end], {})
    assert (
        end not in tokenizer.encode("a<end>b") and text_of(tokenizer, tokenizer.encode("<end>")) == b"<end>"
    )
    assert tokenizer.ends == {0, end}


def test_the_blank_in_front_is_none_of_the_text(foreign) -> None:
    for name in ("llama", "metaspace"):
        tokenizer = foreign[name]
        ids = tokenizer.encode("hello world")
        assert tokenizer.decode(ids) == b" hello world" and text_of(tokenizer, ids) == b"hello world"
        assert tokenizer.spans("hello")[0].tolist()[0] == 0
        for begins, expected in ((True, "hello world"), (False, " hello world")):
            decoder = StreamDecoder(tokenizer, begins)
            assert "".join(decoder.push([index]) for index in ids) + decoder.flush() == expected
        assert tokenizer.decode(tokenizer.encode_inside("hello")) == b"hello"
    assert text_of(foreign["llama"], foreign["llama"].encode("  x")) == b"  x"
    assert text_of(foreign["metaspace"], foreign["metaspace"].encode(" x")) == b"x"  # that kind loses it


def test_others_lose_what_they_do_not_know_and_say_where_their_tokens_stand(foreign) -> None:
    tokenizer, raw = foreign["word piece"], "Hello  WORLD ☃".encode()
    assert text_of(tokenizer, tokenizer.encode(raw)) == "hello world \ufffd".encode()
    assert b"".join(raw[start:stop] for start, stop in tokenizer.spans(raw)) == "HelloWORLD☃".encode()
    tokenizer, raw = foreign["unigram"], b"The \xff cat"
    assert text_of(tokenizer, tokenizer.encode(raw)) == "the \ufffd cat".encode()
    spans = tokenizer.spans(raw)
    assert (
        spans[0].tolist() == [0, 0] or raw[slice(*spans[0])] == b"The"
    )  # the blank in front belongs to no byte
    assert b"".join(raw[start:stop] for start, stop in spans) == raw


def test_words_behind_a_cut_keep_the_blank_in_front_of_each(foreign) -> None:
    tokenizer = foreign["words"]
    assert text_of(tokenizer, tokenizer.encode("the cat</s> on a mat")).endswith(b" on a mat")


@pytest.mark.parametrize("name", ["byte level", "llama", "words"])
def test_long_texts_are_cut_between_lines_without_a_difference(foreign, name: str, monkeypatch) -> None:
    tokenizer, raw = foreign[name], "hello world\nthe cat é sat\n\n  on\n".encode() * 20
    whole = tokenizer.encode(raw)
    monkeypatch.setattr(tokenizer_module, "PIECE_BYTES", 64)
    cuts = list(pieces(raw))
    assert len(cuts) > 8 and b"".join(raw[start:stop] for start, stop in cuts) == raw
    assert (tokenizer.encode(raw) == whole).all()
    if name in MAKERS:
        assert text_of(tokenizer, tokenizer.encode(b"\xe2\x82\xac" * 200)) == b"\xe2\x82\xac" * 200


# -- ids anywhere ------------------------------------------------------------------------------------------------------


def test_the_highest_id_counts_not_their_number() -> None:
    vocabulary = {letter: index for index, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    library = Tokenizer(models.BPE(vocab={**vocabulary, "<far>": 300}, merges=[]))
    library.pre_tokenizer, library.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    library.add_special_tokens([AddedToken("<far>")])
    tokenizer = HuggingFaceTokenizer(json.loads(library.to_str()), 300, [300], {})
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.dtype) == (301, 300, np.uint16)
    assert text_of(tokenizer, tokenizer.encode("x<far>")) == b"x<far>"
    assert tokenizer.decode([280, 0]) == tokenizer.decode([0])  # a hole is no text
    with pytest.raises(DataError, match="token id 301 at position 1"):
        tokenizer.decode([0, 301])


def test_ids_beyond_the_model_are_named_with_both_numbers(tmp_path) -> None:
    folder = saved(tmp_path, byte_level(), tokenizer_config={"eos_token": "<|endoftext|>"})
    highest = read_huggingface_tokenizer(folder).vocab_size - 1
    assert read_huggingface_tokenizer(folder, highest + 1).vocab_size == highest + 1
    token = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(highest)
    with pytest.raises(
        DataError, match=rf"{re.escape(repr(token))} is id {highest}, and the model has {highest} rows"
    ):
        read_huggingface_tokenizer(folder, highest)


# -- a folder ----------------------------------------------------------------------------------------------------------

EOS, START = "<|endoftext|>", "<|im_start|>"
ROLES = {
    "one for both": ({"tokenizer_config": {"bos_token": EOS, "eos_token": EOS}}, 0, {0}),
    "a bos": ({"tokenizer_config": {"bos_token": START, "eos_token": {"content": EOS}}}, 1, {0, 1}),
    "none": (
        {"tokenizer_config": {"bos_token": None, "eos_token": EOS}, "config": {"bos_token_id": 1}},
        0,
        {0},
    ),
    "of the map": ({"special_tokens_map": {"bos_token": {"content": START}, "eos_token": EOS}}, 1, {0, 1}),
    "by id": ({"tokenizer_config": {}, "config": {"bos_token_id": 1, "eos_token_id": 0}}, 1, {0, 1}),
    "ends of chats": (
        {"tokenizer_config": {"eos_token": EOS}, "generation_config": {"eos_token_id": [0, 1]}},
        0,
        {0, 1},
    ),
    "no added token": ({"config": {"bos_token_id": 5, "eos_token_id": 0}}, 0, {0}),
}


@pytest.mark.parametrize("case", ROLES)
def test_which_token_starts_a_document(tmp_path, case: str) -> None:
    files, eot, ends = ROLES[case]
    tokenizer = read_huggingface_tokenizer(saved(tmp_path, byte_level(), **files))
    assert (tokenizer.eot, tokenizer.ends) == (eot, ends)
    assert tokenizer.huggingface_config.keys() >= {"bos_token", "eos_token"}


def test_folders_that_cannot_be_read_say_why(tmp_path, monkeypatch) -> None:
    with pytest.raises(DataError, match="no tokenizer.json, nor any other.*save_pretrained"):
        read_huggingface_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(DataError, match="only tokenizer.model"):
        read_huggingface_tokenizer(tmp_path)
    folder = saved(tmp_path, byte_level(), config={"bos_token_id": 50256})
    with pytest.raises(DataError, match=r'"eos_token" in .*added tokens: <\|endoftext\|>'):
        read_huggingface_tokenizer(folder)
    config = folder / "tokenizer_config.json"
    for wrong, reason in (
        ('{"eos_token": "</s>"}', "eos_token is '</s>', which is no token of tokenizer.json"),
        ('{"eos_token": ', "is not a JSON file"),
        ("[]", "must hold a JSON object, and holds a list"),
    ):
        config.write_text(wrong)
        with pytest.raises(DataError, match=reason):
            read_huggingface_tokenizer(folder)
    config.write_text('{"eos_token": "<|endoftext|>"}')
    whole = json.loads((folder / "tokenizer.json").read_text())
    for change, reason in (
        ({"model": None}, 'no "model"'),
        ({"decoder": {"type": "Unheard"}}, "the library tokenizers .* cannot read it"),
        (
            {"decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}},
            "'CTC' is not one",
        ),
        (
            {"added_tokens": [{"id": 0}]},
            f"{folder}/tokenizer.json: its vocabulary is not as the library tokenizers",
        ),
        ({"model": {"type": "BPE", "vocab": 5}}, "its vocabulary is not as the library tokenizers writes it"),
    ):
        (folder / "tokenizer.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(DataError, match=reason):
            read_huggingface_tokenizer(folder)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r'pip install -e "\.\[hf\]"'):
        read_huggingface_tokenizer(folder)


# -- in a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MAKERS, *LOSSY])
def test_saved_in_a_run_and_loaded(foreign, name: str, tmp_path) -> None:
    tokenizer = foreign[name]
    tokenizer.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content["type"] == "huggingface" and content["tokenizer"] == tokenizer.to_huggingface()
    for other in (load_tokenizer(tmp_path / "tokenizer.json"), copy.deepcopy(tokenizer)):
        assert (other.digest, other.eot, other.ends) == (tokenizer.digest, tokenizer.eot, tokenizer.ends)
        for text in TEXTS:
            assert (other.encode(text) == tokenizer.encode(text)).all()
    for change, reason in (
        ({"eot": "x"}, "eot must be of type int"),
        ({"ends": [999]}, "no token of id 999"),
        ({"special_tokens": {}}, "special_tokens must be"),
        ({"config": {"bos_token": "x"}}, "does not match its digest"),
    ):
        (tmp_path / "edited.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(DataError, match=reason):
            load_tokenizer(tmp_path / "edited.json")


def test_it_comes_from_a_file_and_has_no_name_to_ask_for(tmp_path, foreign, monkeypatch) -> None:
    assert "huggingface" in TOKENIZERS
    with pytest.raises(DataError, match=r"'huggingface' is not one of auto, byte, bpe-<N>, .*, and there"):
        _parse("huggingface")
    foreign["llama"].save(tmp_path / "t.json")
    assert _parse(str(tmp_path / "t.json")).kind is None


def test_a_folder_of_transformers_may_be_asked_for(tmp_path, config) -> None:
    folder = saved(tmp_path / "gpt2", byte_level(), tokenizer_config={"eos_token": EOS})
    expected = read_huggingface_tokenizer(folder)
    (tmp_path / "book.txt").write_text("the cat sat on a mat\n" * 50)
    for spec in (folder, folder / "tokenizer.json"):
        cfg = config(tokenizer=str(spec), input_file=str(tmp_path / "book.txt"))
        assert vocabulary_size(cfg) == expected.vocab_size
        assert load_dataset(cfg, cache_dir=tmp_path / "cache").tokenizer.digest == expected.digest
    (folder / "tokenizer.json").rename(folder / "mine.json")
    with pytest.raises(DataError, match="mine.json' is one of transformers.*called tokenizer.json"):
        load_tokenizer(folder / "mine.json")
    with pytest.raises(DataError, match="no such file"):
        _parse(str(folder))


def test_a_lone_surrogate_is_refused_as_by_ours(foreign) -> None:
    with pytest.raises(DataError, match="character 1"):
        foreign["llama"].encode("a\ud800")
    assert as_bytes("a\udcff") == text_of(foreign["llama"], foreign["llama"].encode("a\udcff"))
