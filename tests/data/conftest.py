"""A config as `load_dataset` reads it, and small texts, for the tests of the data package."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest

from data.bpe import BpeTokenizer
from data.corpus import Document
from data.store import TokenStore, encode_documents
from data.tokenizers import ByteTokenizer

WORDS = ("the cat", "sat", "on a mat", "while rain", "fell softly", "over", "old roofs", "and", "dogs slept")


def prose(seed: str, n_words: int) -> bytes:
    """Deterministic word salad with line ends, accents and digits."""
    words = []
    for number in range(n_words):
        value = int(hashlib.sha256(f"{seed}{number}".encode()).hexdigest()[:8], 16)
        words.append(WORDS[value % len(WORDS)] + {0: ".\n", 1: " é", 2: f" {value % 97}"}.get(value % 11, ""))
    return " ".join(words).encode()


@pytest.fixture(scope="session")
def merging_text() -> bytes:
    """Words with many overlapping pairs, so that ties and repeated merges occur."""
    overlaps = b"aaaa aaa banana bandana newer newest wider lower lowest slow slowly "
    return overlaps * 2 + prose("merges", 300)


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Twelve documents of very different lengths."""
    return [Document(f"doc/{number}", prose(str(number), 1 + 7 * number * number)) for number in range(12)]


@pytest.fixture(scope="session")
def bpe(documents: list[Document]) -> BpeTokenizer:
    return BpeTokenizer.train(documents, 300)


@pytest.fixture(scope="session")
def byte_store(documents: list[Document]) -> TokenStore:
    return encode_documents(documents, ByteTokenizer())


@pytest.fixture(scope="session")
def bpe_store(documents: list[Document], bpe: BpeTokenizer) -> TokenStore:
    return encode_documents(documents, bpe)


@pytest.fixture
def config():
    """A function that makes a config: the fields that data reads, at the schema's defaults."""

    def make(**changes) -> SimpleNamespace:
        fields = {
            "data": "text",
            "input_file": None,
            "data_root": None,
            "near_copies": None,
            "train_files": None,
            "val_files": None,
            "text_field": "text",
            "training_mode": "pretraining",
            "packing": True,
            "shards_tokenizer": None,
            "dataset_name": None,
            "dataset_subset": None,
            "dataset_split": "train",
            "eval_split": "test",
            "dataset_bytes": None,
            "document_separator": None,
            "mix": None,
            "synthetic": "markov",
            "synthetic_bytes": 20_000,
            "synthetic_symbols": 8,
            "synthetic_order": 1,
            "synthetic_pairs": 3,
            "synthetic_rounds": 1,
            "synthetic_keys": 5,
            "synthetic_values": 4,
            "synthetic_min_distance": 6,
            "synthetic_max_distance": 20,
            "tokenizer": "byte",
            "train_seq_len": 32,
        }
        assert changes.keys() <= fields.keys()
        return SimpleNamespace(**{**fields, **changes})

    return make
