"""What a tokenizer does not give back is found per text, kept with the tokens, and said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import normalizers

from data import load_dataset
from data.corpus import Document
from data.huggingface.tokenizer import HuggingFaceTokenizer
from data.lost import first_difference, lost_text
from data.rows import HeldoutRows, TrainingRows, target_bytes
from data.store import encode_documents
from data.yardsticks import yardsticks
from tests.data.foreign import byte_level, llama

LINE = "hello world the cat sat on a mat\n"


@pytest.fixture(scope="module")
def small_letters() -> HuggingFaceTokenizer:
    """Loses capitals and accents, and gives back all else."""
    library = byte_level()
    steps = [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    library.normalizer = normalizers.Sequence(steps)
    return HuggingFaceTokenizer(json.loads(library.to_str()), 0, [0], {})


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        ("an École", "an ecole", ("É", "e")),
        ("a  b", "a b", (" ", "")),
        (" hello", "hello", (" ", "")),
        ("one \ufb01ne day here", "one fine day here", ("\ufb01", "fi")),
        ("the end\n", "the end", ("\n", "")),
        ("x" * 200 + "Y" * 300, "x" * 200 + "z" * 300, ("Y" * 48, "z" * 48)),
    ],
)
def test_the_first_difference(before: str, after: str, parts: tuple[str, str]) -> None:
    assert first_difference(before, after) == parts


def documents(*odd: str) -> list[Document]:
    texts = [LINE * 40, *odd, LINE * 30]
    return [Document(str(number), text.encode()) for number, text in enumerate(texts)]


def test_documents_that_come_back_otherwise_are_kept_as_they_were(small_letters) -> None:
    store = encode_documents(documents("Hello É\n" * 30), small_letters)
    assert store.lossy_documents.tolist() == [1]
    assert [store.text(index) for index in range(3)] == [text for _, text in documents("Hello É\n" * 30)]
    assert store.said(1) == b"hello e\n" * 30 and store.doc_bytes[1] == 30 * len("Hello É\n".encode())
    assert lost_text({"heldout": store}) == [
        f"tokenizer {small_letters.name} does not give all text back: 1 of 3 held-out documents (270 of 2,580 bytes) "
        f"come back otherwise; for example 'H' became 'h'. Bits per byte are the nats of what the tokens say over the "
        f"bytes of the raw text: what is lost costs nothing, so the score does not compare with those of "
        f"other tokenizers"
    ]


def test_text_that_comes_back_is_not_kept_and_not_spoken_of(small_letters, bpe) -> None:
    for tokenizer in (small_letters, bpe):
        store = encode_documents(documents(), tokenizer)
        assert store.raw is None and not len(store.lossy_documents) and lost_text({"train": store}) == []


@pytest.fixture
def book(tmp_path) -> str:
    path = tmp_path / "book.txt"
    path.write_bytes((LINE * 300 + "An École, and another ÉCOLE\n" * 40).encode())
    return str(path)


def test_it_is_said_from_the_cache_too(config, book, tmp_path, small_letters, monkeypatch) -> None:
    cfg = config(input_file=book)
    first = load_dataset(cfg, cache_dir=tmp_path / "cache", tokenizer=small_letters)
    plain = load_dataset(cfg, cache_dir=tmp_path / "bytes")
    monkeypatch.setattr("data.store.encode_documents", lambda *_: pytest.fail("encoded twice"))
    again = load_dataset(cfg, cache_dir=tmp_path / "cache", tokenizer=small_letters)
    for dataset in (first, again):
        said = [note for note in dataset.notes if "does not give all text back" in note]
        assert len(said) == 1 and "'An É' became 'an e'" in said[0] and "held-out documents" in said[0]
    sides = (again.train, again.heldout)
    raw = b"".join(store.text(index) for store in sides for index in range(store.n_docs))
    assert raw == Path(book).read_bytes() and sum(store.total_bytes for store in sides) == len(raw)
    assert yardsticks(again)["3-gram"] == yardsticks(plain)["3-gram"]


def test_rows_know_of_which_documents_they_score_less_than_the_bytes(small_letters) -> None:
    store = encode_documents(documents("É" * 50), small_letters)
    every = HeldoutRows(store, small_letters.eot, 32)
    assert every.lossy_documents == 1 and every.total_bytes == store.total_bytes
    some = HeldoutRows(store, small_letters.eot, 32, max_bytes=1000)
    assert some.lossy_documents == int(1 in some.documents)


def test_rows_count_bytes_of_the_raw_text_whatever_the_tokens_say() -> None:
    """A letter and its accent (three bytes) become one (two), as with Qwen's tokenizers."""
    library = byte_level()
    library.normalizer = normalizers.NFC()
    tokenizer = HuggingFaceTokenizer(json.loads(library.to_str()), 0, [0], {})
    store = encode_documents(documents("e\u0301cole " * 40, "\u00e9cole " * 40, "cafe\u0301"), tokenizer)
    assert store.lossy_documents.tolist() == [1, 3] and store.said(1) == store.text(2)
    rows = HeldoutRows(store, tokenizer.eot, 16)
    found = np.zeros(store.n_docs, dtype=np.int64)
    for row in range(rows.n_rows):
        batch = rows.batch(np.arange(row, row + 1))
        assert batch.sizes is not None and batch.bytes == batch.sizes.sum() and (batch.sizes >= 0).all()
        assert not batch.sizes[batch.weights == 0].any()
        found[rows.documents[rows.document_of[row]]] += batch.bytes
    assert found.tolist() == store.doc_bytes.tolist()
    training = TrainingRows(store, tokenizer.eot, 1)  # leaves out no target
    assert training.batch(np.arange(training.rows_per_epoch)).bytes == store.total_bytes
    part = HeldoutRows(store, tokenizer.eot, 16, max_tokens=200)
    assert not part.complete and part.total_bytes == part.batch(np.arange(part.n_rows)).bytes


def test_a_blank_in_front_counts_no_byte() -> None:
    tokenizer = HuggingFaceTokenizer(json.loads(llama().to_str()), 1, [2], {})
    store = encode_documents([Document("a", LINE.encode() * 3), Document("b", b"x" * 60)], tokenizer)
    assert store.raw is None
    tokens = np.array([[tokenizer.eot, *store.tokens[:7].astype(np.int64)]])
    assert target_bytes(tokens, tokenizer).sum() == tokenizer.token_bytes[store.tokens[:7]].sum() - 1
    rows = HeldoutRows(store, tokenizer.eot, 8)
    parts = [rows.batch(np.arange(row, row + 1)).bytes for row in range(rows.n_rows)]
    assert sum(parts) == rows.total_bytes == store.total_bytes
    training = TrainingRows(store, tokenizer.eot, 8)
    assert training.batch(np.arange(training.rows_per_epoch)).bytes <= store.total_bytes
