"""Tokenizers are lossless, deterministic, and refuse files and ids that are not theirs."""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import string
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import bpe as bpe_module
from data.bpe import BpeTokenizer, count_words
from data.corpus import Document
from data.errors import DataError
from data.merges import MIN_COUNT, _PairTable, learn_merges
from data.tokenizers import END_OF_TEXT, ByteTokenizer, StreamDecoder, load_tokenizer

messy_bytes = st.one_of(st.binary(max_size=80), st.text(max_size=60).map(lambda text: text.encode()))


@given(raw=messy_bytes)
@example(raw=b"caf\xc3\xa9 \xff\xc3 the cat\xe2\x82")
@example(raw=b"\xed\xa0\x80")  # an encoded surrogate: not UTF-8
@settings(deadline=None)
def test_round_trip_is_exact_for_any_bytes(raw: bytes, bpe: BpeTokenizer) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(raw)
        assert tokenizer.decode(ids) == raw
        assert int(tokenizer.token_bytes[ids].sum()) == len(raw)
        assert ids.dtype == tokenizer.dtype and not (ids == tokenizer.eot).any()


@given(raw=st.lists(messy_bytes, max_size=12).map(b"\n".join))
@settings(deadline=None, max_examples=50)
def test_long_texts_are_cut_into_pieces_without_loss(raw: bytes, bpe: BpeTokenizer) -> None:
    limit = bpe_module.PIECE_BYTES
    bpe_module.PIECE_BYTES = 16
    try:
        assert bpe.decode(bpe.encode(raw)) == raw
        spans = list(bpe_module._pieces(raw))
    finally:
        bpe_module.PIECE_BYTES = limit
    assert b"".join(raw[start:stop] for start, stop in spans) == raw
    assert all(0 < stop - start <= 16 for start, stop in spans)


def test_decoding_some_ids_at_a_time_changes_nothing(bpe: BpeTokenizer, monkeypatch) -> None:
    monkeypatch.setattr("data.tokenizers.AT_A_TIME", 3)
    for tokenizer in (bpe, ByteTokenizer()):
        ids = [*tokenizer.encode("the café on a mat"), tokenizer.eot, *tokenizer.encode("while rain")]
        assert tokenizer.decode(ids) == "the café on a matwhile rain".encode() and tokenizer.decode([]) == b""


def test_pieces_never_cut_a_character() -> None:
    raw = "é€𝄞".encode() * 100_000
    for start, stop in bpe_module._pieces(raw):
        raw[start:stop].decode("utf-8")


def test_text_and_its_bytes_encode_alike(bpe: BpeTokenizer) -> None:
    text = "the café on a mat"
    assert (bpe.encode(text) == bpe.encode(text.encode())).all()
    assert bpe.decode(bpe.encode("arg\udcff")) == b"arg\xff"  # how Python passes undecodable arguments


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(DataError, match="character 3"):
        ByteTokenizer().encode("abc\ud800")


def test_literal_end_of_text_stays_text(bpe: BpeTokenizer) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(END_OF_TEXT)
        assert tokenizer.eot not in ids.tolist()
        assert tokenizer.decode(ids) == END_OF_TEXT.encode()
        assert tokenizer.decode([tokenizer.eot]) == b""


def test_vocabulary_sizes(bpe: BpeTokenizer) -> None:
    assert (ByteTokenizer().vocab_size, ByteTokenizer().eot) == (257, 256)
    assert (bpe.vocab_size, bpe.eot, bpe.name, len(bpe.token_bytes)) == (300, 299, "bpe-300", 300)
    assert bpe.token_bytes[bpe.eot] == 0


@pytest.mark.parametrize("wrong", [300, -1])
def test_ids_beyond_the_vocabulary_are_named(bpe: BpeTokenizer, wrong: int) -> None:
    with pytest.raises(DataError, match=rf"token id {wrong} at position 2 .*0 to 299"):
        bpe.decode([1, 2, wrong, 4])


def plain_merges(words: Counter[str], size: int) -> list[bytes]:
    """A restatement that recounts everything before each merge."""
    spelled = {word: [bytes([value]) for value in word.encode()] for word in words}
    expected = [bytes([value]) for value in range(256)]
    while len(expected) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in spelled.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += words[word]
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)  # ties: the smaller bytes
        if pair is None or pairs[pair] < MIN_COUNT:
            break
        expected.append(merged := pair[0] + pair[1])
        for parts in spelled.values():
            place = 0
            while place < len(parts) - 1:
                if (parts[place], parts[place + 1]) == pair:
                    parts[place : place + 2] = [merged]
                place += 1
    return expected


def test_training_merges_like_a_plain_count_of_pairs(merging_text: bytes) -> None:
    words = count_words([merging_text])
    ranks = learn_merges(words, 340)
    assert ranks == plain_merges(words, 340) and len(set(ranks)) == len(ranks)
    assert 300 < len(ranks) < 340  # the text ran out of pairs, as intended


few_letters = st.dictionaries(st.text("abé", min_size=1, max_size=12), st.integers(1, 4), max_size=8)


@given(words=few_letters)
@settings(deadline=None, max_examples=60)
def test_merges_of_words_full_of_overlaps(words: dict[str, int]) -> None:
    assert learn_merges(Counter(words), 275) == plain_merges(Counter(words), 275)


def test_one_long_word_is_merged_like_short_ones() -> None:
    word = "".join(random.Random(0).choices("ACGT", k=3000))
    assert learn_merges(Counter([word]), 290) == plain_merges(Counter([word]), 290)


@pytest.mark.parametrize(
    "letters",
    ["ACGT", "".join(map(chr, range(0x4E00, 0x5000))), string.ascii_letters],
    ids=["DNA", "Chinese", "base64"],
)
def test_work_does_not_grow_with_words_or_with_how_many_pairs_differ(letters: str, monkeypatch) -> None:
    looked_at, pushed = [], []
    where, number, push = _PairTable._where, _PairTable._number, heapq.heappush

    def note_where(self, pair: int) -> np.ndarray:
        looked_at.append(int(np.diff(self.lies[pair])[0]))
        return where(self, pair)

    def note_number(self, tokens: np.ndarray, places: np.ndarray, starts: np.ndarray) -> None:
        looked_at.append(len(places))
        number(self, tokens, places, starts)

    monkeypatch.setattr(_PairTable, "_where", note_where)
    monkeypatch.setattr(_PairTable, "_number", note_number)
    counted = SimpleNamespace(
        heappush=lambda heap, entry: (pushed.append(1), push(heap, entry)), heappop=heapq.heappop
    )
    monkeypatch.setattr("data.merges.heapq", counted)
    draw = random.Random(0)
    for word_length in (300_000, 6):
        words = Counter("".join(draw.choices(letters, k=word_length)) for _ in range(300_000 // word_length))
        size = sum(len(word.encode()) for word in words)
        looked_at.clear(), pushed.clear()
        assert len(learn_merges(words, 1500)) == 1500
        assert sum(looked_at) < 5 * size  # each byte begins a pair once, and each merge makes two
        assert len(pushed) < 10 * 1500


def test_of_a_document_longer_than_the_sample_its_beginning_is_read(monkeypatch) -> None:
    monkeypatch.setattr("data.bpe.SAMPLE_BYTES_PER_TOKEN", 4)  # 1,040 bytes for 260 ids
    begins, goes_on = b"ab ab cd cd\n" * 90, b"xy xy zz zz\n" * 10_000
    whole = BpeTokenizer.train([Document("a", begins + goes_on)], 260)
    assert whole.digest == BpeTokenizer.train([Document("a", begins)], 260).digest


blanks = st.sampled_from(
    ["\n", " ", "  ", "\t", "\r\n", "\x0b", "\x1c", "\x85", "\u00a0", "\u2003", "\u2028", "\u3000"]
)
pieces_of_text = st.lists(
    blanks | st.sampled_from(["a", "é", "漢", "Я", "7", "/", ".", "'s", "x1"]), max_size=30
)


@given(text=pieces_of_text.map("".join) | st.text(max_size=40))
@example(text="a.\n/b \n  \n\n c \u2003 d  e\n'll 漢 字")
@settings(deadline=None, max_examples=200)
def test_words_counted_in_stretches_are_those_of_the_whole(text: str) -> None:
    raw, stretch = text.encode(), bpe_module.STRETCH_BYTES
    bpe_module.STRETCH_BYTES = 1
    try:
        parts = list(bpe_module._stretches([raw]))
        counted = count_words([raw, raw])
    finally:
        bpe_module.STRETCH_BYTES = stretch
    assert b"".join(parts) == raw
    assert counted == Counter(regex.findall(bpe_module.SPLIT_PATTERN, text) * 2)


def test_words_are_counted_up_to_what_fits_into_memory(monkeypatch) -> None:
    monkeypatch.setattr(bpe_module, "WORDS_AT_A_TIME", 25)
    texts = [b" ".join(b"%d%c" % (n, 97 + n % 26) for n in range(start, start + 200)) for start in (0, 200)]
    monkeypatch.setattr(bpe_module, "WORD_MEMORY", 60 * (bpe_module.PER_WORD + 2 * bpe_module.PER_BYTE))
    few = count_words(texts)
    assert 60 < len(few) < 120 and few == count_words(texts[:1])
    monkeypatch.setattr(bpe_module, "WORD_MEMORY", 1 << 30)
    assert few.keys() < count_words(texts).keys()


def test_a_text_without_blanks_is_counted_in_parts_of_whole_characters(monkeypatch) -> None:
    monkeypatch.setattr(bpe_module, "STRETCH_BYTES", 5)
    monkeypatch.setattr(bpe_module, "LONGEST_STRETCH", 10)
    text = "漢字" * 7 + " a b"
    parts = list(bpe_module._stretches([text.encode()]))
    assert b"".join(parts).decode() == text and [len(part) for part in parts] == [9, 9, 9, 9, 6, 4]


def test_merges_do_not_depend_on_how_many_places_are_counted_at_a_time(merging_text, monkeypatch) -> None:
    words = count_words([merging_text])
    whole = learn_merges(words, 340)
    monkeypatch.setattr("data.merges.AT_A_TIME", 7)
    assert learn_merges(Counter(dict(reversed(words.items()))), 340) == whole


def test_ids_are_fixed_whatever_is_installed(merging_text, monkeypatch) -> None:
    """The same merges without any package that could train or count; their digest is that of every machine."""
    for package in ("rustbpe", "tokenizers", "torch"):
        monkeypatch.setitem(sys.modules, package, None)
    tokenizer = BpeTokenizer.train([Document("a", merging_text)], 320)
    assert hashlib.sha256(b"\0".join(tokenizer.ranks[256:])).hexdigest()[:16] == "426a0ee13102d79f"
    assert [tokenizer.ranks[index] for index in (256, 257, 258, 318)] == [b" o", b" s", b"at", b"es"]


def test_training_is_deterministic_and_sees_the_sample_only(
    documents: list[Document], bpe: BpeTokenizer
) -> None:
    again = BpeTokenizer.train(list(reversed(documents)), 300)
    assert again.digest == bpe.digest
    assert BpeTokenizer.train(documents, 299).digest != bpe.digest


def test_too_little_text_names_the_largest_vocabulary() -> None:
    document = Document("a", b"abab abab")
    with pytest.raises(DataError, match=r"at most bpe-(\d+)") as error:
        BpeTokenizer.train([document], 1024)
    largest = int(str(error.value).split("at most bpe-")[1].split(".")[0])
    assert BpeTokenizer.train([document], largest).vocab_size == largest


def test_save_and_load(tmp_path, bpe: BpeTokenizer) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        path = tmp_path / f"{tokenizer.name}.json"
        tokenizer.save(path)
        loaded = load_tokenizer(path)
        assert (loaded.digest, loaded.vocab_size, loaded.eot) == (
            tokenizer.digest,
            tokenizer.vocab_size,
            tokenizer.eot,
        )
        assert (loaded.encode(b"the cat\xff") == tokenizer.encode(b"the cat\xff")).all()
    content = json.loads((tmp_path / "bpe-300.json").read_text())
    assert content.keys() == {"format_version", "type", "pat_str", "special_tokens", "ranks", "digest"}


def _damage(content: dict, **changes) -> bytes:
    return json.dumps({**content, **changes}).encode()


def test_files_that_are_no_tokenizer_are_refused_by_reason(tmp_path, bpe: BpeTokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(path)
    bpe.save(path)
    content = json.loads(path.read_text())
    cases = {
        "not a JSON file": path.read_bytes()[:-20],
        'no "format_version"': b'{"merges": []}',
        "format_version 2 is not known": _damage(content, format_version=2),
        "'unigram' is not one of byte, bpe": _damage(content, type="unigram"),
        "list of base64": _damage(content, ranks=["?"]),
        "all 256 single bytes": _damage(content, ranks=content["ranks"][1:]),
        "same bytes twice": _damage(content, ranks=[*content["ranks"], content["ranks"][-1]]),
        "as its tokens say": _damage(content, special_tokens={END_OF_TEXT: 0}),
        "does not match its digest": _damage(content, pat_str=content["pat_str"] + "|x"),
        "tiktoken does not accept": _damage(content, pat_str="("),
        "pat_str must be a string": _damage(content, pat_str=None),
    }
    for reason, raw in cases.items():
        path.write_bytes(raw)
        with pytest.raises(DataError, match=reason) as error:
            load_tokenizer(path)
        assert str(path) in str(error.value)


def test_streaming_decoder_waits_for_whole_characters(bpe: BpeTokenizer) -> None:
    text = "naïve 𝄞 €"
    decoder = StreamDecoder(ByteTokenizer())
    pushed = [decoder.push([byte]) for byte in text.encode()]
    assert "".join(pushed) == text and decoder.flush() == ""
    assert all("\ufffd" not in part for part in pushed)
    decoder = StreamDecoder(bpe)
    assert decoder.push(bpe.encode("é".encode()[:1])) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(bpe.encode(b"\xff!")) == "\ufffd!"


def test_dtype_follows_the_vocabulary() -> None:
    assert ByteTokenizer().dtype == np.uint16
    ranks = [bytes([value]) for value in range(256)]
    ranks += [bytes([first, second]) for first in range(256) for second in range(256)]
    for vocab_size, dtype in ((65_536, np.uint16), (65_537, np.uint32)):
        tokenizer = BpeTokenizer(ranks[: vocab_size - 1])
        assert (tokenizer.vocab_size, tokenizer.dtype) == (vocab_size, dtype)
        assert tokenizer.encode(ranks[-1]).tolist() == list(ranks[-1])
