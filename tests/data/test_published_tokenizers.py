"""Tokenizers known by name: tiktoken's own ids, from files that are found, checked or downloaded."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import Tokenizer

from data import TOKENIZERS, load_dataset
from data import bpe as bpe_module
from data.bpe import _pieces
from data.char import CharTokenizer
from data.corpus import Document
from data.errors import DataError
from data.published import PUBLISHED, Cl100kBase, Gpt2, PublishedTokenizer, RanksFile
from data.tokenizer_choice import choose, vocabulary_size
from data.tokenizers import ByteTokenizer, load_tokenizer
from tests.data.ranks import seed

NAMES = ["gpt2", "cl100k_base", "o200k_base"]
GROUPS = st.sampled_from(
    [" ", "  ", "\n", "\t", "\r\n", "\n\n", ".", ".\n/", "the cat", "12345", "don't", "É", "𝄞", "_=", "x"]
    + ["\u2028", "\u2003", "\u00a0", "\u3000", "漢字", "СЛОВО", "слово", "<|endoftext|>", "<|fim_prefix|>"]
)
TEXTS = st.text(max_size=40) | st.lists(GROUPS, max_size=30).map("".join)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return seed(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="session")
def published(folder: Path) -> dict[str, tuple[PublishedTokenizer, tiktoken.Encoding]]:
    """Ours, and tiktoken's own from the same files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        patch.setattr("urllib.request.urlopen", no_network)
        return {
            name: (
                TOKENIZERS[name].load().fetch(Path("/nowhere")),
                tiktoken.Encoding(**getattr(openai_public, name)()),
            )
            for name in NAMES
        }


@pytest.fixture
def alone(tmp_path, monkeypatch) -> Path:
    """A machine without a network and without any of the files; the folder of its cache."""
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def no_network(*_, **__):
    raise urllib.error.URLError("no network")


def test_hello_world(published) -> None:
    assert published["gpt2"][0].encode("Hello world").tolist() == [15496, 995]
    assert published["cl100k_base"][0].encode("Hello world").tolist() == [9906, 1917]
    assert published["o200k_base"][0].encode("Hello world").tolist() == [13225, 2375]


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS)
@example(text="x.\n/y a\n\n  b\n c  d \u2003 e")
@settings(deadline=None, max_examples=150)
def test_ids_are_tiktokens_own_whatever_the_pieces(published, name: str, text: str) -> None:
    mine, theirs = published[name]
    expected = theirs.encode_ordinary(text)
    assert mine.encode(text).tolist() == expected
    assert mine.decode(mine.encode(text)) == text.encode()
    for raw in (text.encode(), ("x " + text).encode()):
        cuts = [match.end() for match in mine.cuts.finditer(raw)]
        pieces = [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        joined = [index for piece in pieces for index in theirs.encode_ordinary(piece.decode())]
        assert joined == theirs.encode_ordinary(raw.decode())


def test_a_long_text_is_cut_at_the_last_place_that_changes_no_id(published, monkeypatch) -> None:
    monkeypatch.setattr(bpe_module, "PIECE_BYTES", 2000)
    mine, theirs = published["gpt2"]
    text = "a cat\n\n  sat on\n\tmats, 漢字 and so on.\n" * 200 + "\n" * 500
    ends = [stop for _, stop in _pieces(text.encode(), mine.cuts)]
    assert len(ends) > 3 and all(end <= 2000 * (n + 1) for n, end in enumerate(ends[:3])) and ends[0] > 1900
    assert mine.encode(text).tolist() == theirs.encode_ordinary(text)


@pytest.mark.parametrize("unit", ["^", "a", " ", "\n", "漢", "'s", "ACGTTGCA", "U29tZSBiYXNlNjQ+/"])
def test_a_text_of_a_million_bytes_without_a_word_comes_back(published, bpe, unit: str) -> None:
    raw = unit.encode() * (1_000_000 // len(unit.encode()))
    char = CharTokenizer.train([Document("a", raw)])
    for tokenizer in (*(mine for mine, _ in published.values()), bpe, char, ByteTokenizer()):
        assert tokenizer.decode(tokenizer.encode(raw)) == raw
    if unit == "^":
        assert len(published["gpt2"][0].encode(raw)) == 250_000


@pytest.mark.parametrize(
    ("name", "size", "eot"),
    [("gpt2", 50257, 50256), ("cl100k_base", 100277, 100257), ("o200k_base", 200019, 199999)],
)
def test_sizes_and_tokens_that_text_never_becomes(published, config, name: str, size: int, eot: int) -> None:
    mine, theirs = published[name]
    assert (mine.vocab_size, mine.eot, mine.name) == (size, eot, name) == (theirs.n_vocab, eot, theirs.name)
    assert mine.special_tokens == theirs._special_tokens and mine.ends == {eot}
    assert vocabulary_size(config(tokenizer=name)) == size
    assert mine.dtype == (np.uint16 if size <= 65536 else np.uint32)
    for literal in mine.special_tokens:
        ids = mine.encode(f"a{literal}b").tolist()
        assert max(ids) < min(mine.special_tokens.values()) and mine.decode(ids) == f"a{literal}b".encode()
    nothing = np.flatnonzero(mine.token_bytes == 0)
    assert set(mine.special_tokens.values()) <= set(nothing.tolist()) and mine.decode(nothing) == b""
    assert len(nothing) == size - theirs.max_token_value - 1 + size - len(theirs._mergeable_ranks)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "o200k_base" else n for n in NAMES]
)
def test_in_the_form_of_hugging_face(published, name: str) -> None:
    mine, _ = published[name]
    theirs = Tokenizer.from_str(json.dumps(mine.to_huggingface()))
    theirs.encode_special_tokens = True
    text = (
        "Don't stop  at 12345:\n\n\n  ÉCOLE's 漢字\u3000\u2028x.\n/y <|endoftext|>\t\tdef f():\n    pass  \n"
    )
    assert theirs.encode(text).ids == mine.encode(text).tolist()
    assert theirs.decode(mine.encode(text).tolist()) == text
    assert all(theirs.token_to_id(token) == index for token, index in mine.special_tokens.items())


@pytest.mark.parametrize("name", NAMES)
def test_saved_with_its_ranks_and_loaded_without_the_file(published, alone, tmp_path, name: str) -> None:
    mine, _ = published[name]
    mine.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert type(loaded) is type(mine) and loaded.digest == mine.digest
    assert loaded.encode("the cat\n").tolist() == mine.encode("the cat\n").tolist()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    ranks = content["ranks"]
    for change in ({"ranks": [*ranks[:300], ranks[301], ranks[300], *ranks[302:]]}, {"digest": "0" * 64}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(DataError, match="does not match its digest"):
            load_tokenizer(tmp_path / "tokenizer.json")


# -- where the file comes from -----------------------------------------------------------------------------------------


def as_ranks(tokenizer: PublishedTokenizer) -> bytes:
    """A .tiktoken file of its ranks, byte for byte as published."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokenizer.ranks)]
    return b"".join(lines)


def test_gpt2_and_r50k_base_are_one(published, folder, alone, monkeypatch) -> None:
    assert TOKENIZERS["r50k_base"].load() is Gpt2
    mine = published["gpt2"][0]  # from vocab.bpe
    place = alone / "tokenizers" / "r50k_base.tiktoken"
    place.parent.mkdir(parents=True)
    place.write_bytes(as_ranks(mine))
    assert Gpt2.fetch(alone).digest == mine.digest


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", None])
@pytest.mark.parametrize("which", [0, 1])
def test_found_in_a_folder_under_either_name(
    published, alone, monkeypatch, tmp_path, variable, which
) -> None:
    home = tmp_path / "seeded" if variable else tmp_path / "temporary" / "data-gym-cache"
    if variable:
        monkeypatch.setenv(variable, str(home))
    home.mkdir(parents=True)
    (home / Gpt2.files[0].names[which]).write_bytes(as_ranks(published["gpt2"][0]))
    assert Gpt2.fetch(alone).digest == published["gpt2"][0].digest


def test_without_file_and_network_the_message_names_both_ways_out(
    alone, config, tmp_path, monkeypatch
) -> None:
    (tmp_path / "book.txt").write_text("the cat sat on a mat\n" * 50)
    cfg = config(tokenizer="cl100k_base", input_file=str(tmp_path / "book.txt"))
    both = (
        r"tokenizer=cl100k_base: .* not on this machine, .* failed: .*no network.*Bring https://\S+/"
        r"cl100k_base.tiktoken .* set tokenizer=<that file>; or .* set TIKTOKEN_CACHE_DIR="
    )
    with pytest.raises(DataError, match=both):
        load_dataset(cfg, cache_dir=alone)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    (tmp_path / "cl100k_base.tiktoken").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"\(.*/cl100k_base.tiktoken holds other bytes\)"):
        load_dataset(cfg, cache_dir=alone)


def test_downloaded_once_checked_and_kept(published, alone, monkeypatch) -> None:
    right, asked = as_ranks(published["gpt2"][0]), []

    def serve(raw: bytes):
        def urlopen(url, timeout):
            asked.append(url)
            return io.BytesIO(raw)

        monkeypatch.setattr("urllib.request.urlopen", urlopen)

    serve(right[:-9])
    with pytest.raises(DataError, match="came with other bytes than are known"):
        Gpt2.fetch(alone)
    assert not list(alone.rglob("*.tiktoken"))
    serve(right)
    assert Gpt2.fetch(alone).digest == Gpt2.fetch(alone).digest == published["gpt2"][0].digest
    assert asked == [Gpt2.files[0].url] * 2


def test_a_run_by_name_and_by_file_is_one(published, folder, alone, config, tmp_path, monkeypatch) -> None:
    (tmp_path / "book.txt").write_text("the cat sat on a mat\n" * 50)
    cfg = config(input_file=str(tmp_path / "book.txt"), tokenizer=str(tmp_path / "mine.tiktoken"))
    (tmp_path / "mine.tiktoken").write_bytes(as_ranks(published["cl100k_base"][0]))
    assert choose(cfg)[0].kind is None
    by_file = load_dataset(cfg, cache_dir=alone)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    cfg.tokenizer = "cl100k_base"
    by_name = load_dataset(cfg, cache_dir=alone)
    assert by_file.tokenizer.digest == by_name.tokenizer.digest == published["cl100k_base"][0].digest
    assert by_file.cache_path == by_name.cache_path and by_name.train.tokens.dtype == np.uint32
    (tmp_path / "mine.tiktoken").write_bytes(b"YQ== 0\nYg== 1\n")
    cfg.tokenizer = str(tmp_path / "mine.tiktoken")
    with pytest.raises(DataError, match=r"14 bytes\) is none of .*r50k_base.tiktoken .*o200k_base.tiktoken"):
        load_dataset(cfg, cache_dir=alone)


def test_addresses_and_digests_are_those_that_tiktoken_knows(monkeypatch) -> None:
    known = {}

    def note(file: str, expected_hash: str) -> dict[bytes, int]:
        known[RanksFile(file, expected_hash)] = file
        return {}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", note)
    for name in ("r50k_base", "cl100k_base", "o200k_base"):
        getattr(openai_public, name)()
    assert {kind.files[0] for kind in PUBLISHED} == set(known)
    assert Cl100kBase.files[0].names[1] == "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
