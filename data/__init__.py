"""Where tokens come from: corpora, tokenizers, the order of documents, rows, and the yardsticks of a score.

`load_dataset(cfg)` is the way in. Numpy only: adapters make tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.cache import cache_root
from data.errors import DataError
from naming import Entry, did_you_mean, not_one_of

if TYPE_CHECKING:
    from data.corpus import Corpus, TrueModel
    from data.store import TokenStore
    from data.tokenizers import Tokenizer

__all__ = ["SOURCES", "DataError", "Dataset", "Source", "load_dataset", "readers"]

AUTO_BPE = 1024  # what `tokenizer: auto` means for real text


@dataclass(frozen=True)
class Source(Entry):
    """Where text comes from. `factory` is `(cfg) -> Corpus`.

    `needs` are those of its fields that must be set, each with what it takes: "input_file=<file or folder>".
    """

    needs: tuple[str, ...] = ()


# `data=<name>`
SOURCES: dict[str, Source] = {
    "embedded": Source("data.embedded:load", (), "the source of the Python standard library on this disk"),
    "text": Source(
        "data.text:load",
        ("input_file", "data_root"),
        "your own text",
        needs=("input_file=<file or folder>",),
    ),
    "synthetic": Source(
        "data.synthetic:load",
        ("synthetic", "synthetic_bytes", "synthetic_symbols", "synthetic_order"),
        "generated text of exactly known entropy",
    ),
}
CACHE_FORMAT = 1  # part of every cache key: raise it when tokens or tokenizers would come out differently


def readers(field: str) -> list[str]:
    """Names of the sources that read a generic field."""
    return [name for name, source in SOURCES.items() if field in source.reads]


@dataclass(frozen=True)
class Dataset:
    """A corpus as tokens. `fingerprint` is that of the text and its split, whatever the tokenizer.

    `truth` and `entropy_bits_per_byte` are set for synthetic text only. `notes` are sentences for the user.
    `cache_path` is the folder that holds the token arrays, None where no cache could be written.
    """

    tokenizer: Tokenizer
    train: TokenStore
    heldout: TokenStore
    fingerprint: str
    name: str
    entropy_bits_per_byte: float | None = None
    truth: TrueModel | None = None
    notes: tuple[str, ...] = ()
    cache_path: Path | None = None


def load_dataset(
    cfg: Any,
    *,
    unit: Literal["token", "byte"] = "token",
    cache_dir: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """Read `cfg.data`, tokenise it (or map the cached tokens) and split it.

    Args:
        cfg: fields data, input_file, data_root, synthetic, synthetic_bytes, synthetic_symbols,
            synthetic_order, tokenizer, train_seq_len.
        unit: what the architecture reads; with "byte" the tokenizer is that of single bytes.
        cache_dir: instead of `data.cache.cache_root()`.
        tokenizer: instead of the one `cfg.tokenizer` names (a checkpoint's own, for resuming and scoring).

    Raises:
        DataError: the text or tokenizer cannot be used as asked, or the text is too short for one row.
    """
    from data.rows import TrainingRows

    corpus = _load_corpus(cfg)
    cache = Path(cache_dir) if cache_dir is not None else cache_root()
    notes = list(corpus.notes)
    if tokenizer is None:
        spec = byte_or(cfg.tokenizer, unit, notes)
        tokenizer = _tokenizer(spec, cfg.data, corpus, cache, notes)
    stores, folder = _stores(corpus, tokenizer, cache, notes)
    dataset = Dataset(
        tokenizer=tokenizer,
        train=stores["train"],
        heldout=stores["heldout"],
        fingerprint=corpus.fingerprint,
        name=corpus.name,
        entropy_bits_per_byte=corpus.truth.entropy_bits_per_byte if corpus.truth else None,
        truth=corpus.truth,
        notes=tuple(notes),
        cache_path=folder,
    )
    TrainingRows(dataset.train, tokenizer.eot, cfg.train_seq_len)  # refuses a text too short for one row
    return dataset


def byte_or(spec: str, unit: Literal["token", "byte"], notes: list[str] | None = None) -> str:
    """What `tokenizer: <spec>` means for an architecture that reads this unit. DataError where the two exclude each
    other."""
    if unit == "token" or spec == "byte":
        return spec
    if spec != "auto":
        raise DataError(
            f"tokenizer is {spec!r}, and this architecture reads bytes. Set tokenizer=byte, or leave it at auto"
        )
    if notes is not None:
        notes.append("tokenizer auto: byte, as this architecture reads bytes")
    return "byte"


def _load_corpus(cfg: Any) -> Corpus:
    if cfg.data not in SOURCES:
        raise DataError(f"data: {not_one_of(cfg.data, SOURCES)}")
    return SOURCES[cfg.data].load()(cfg)


def _tokenizer(spec: str, source: str, corpus: Corpus, cache: Path, notes: list[str]) -> Tokenizer:
    from data.tokenizers import ByteTokenizer, load_tokenizer

    if spec == "byte":
        return ByteTokenizer()
    if spec == "auto":
        return _auto_tokenizer(source, corpus, cache, notes)
    if match := re.fullmatch(r"bpe-(\d+)", spec):
        return _cached_bpe(int(match[1]), corpus, cache, notes)
    path = Path(spec).expanduser()
    if not path.is_file():
        likely = re.sub(r"^bpe[-_ ]?(\d+)$", r"bpe-\1", spec.lower())
        hint = did_you_mean(
            likely, ["auto", "byte", f"bpe-{AUTO_BPE}", *([likely] if likely.startswith("bpe-") else [])]
        )
        raise DataError(
            f"tokenizer is {spec!r}: allowed are auto, byte, bpe-<N> (such as bpe-{AUTO_BPE}) and the "
            f"path of a tokenizer.json; there is no such file.{hint}"
        )
    return load_tokenizer(path)


def _auto_tokenizer(source: str, corpus: Corpus, cache: Path, notes: list[str]) -> Tokenizer:
    from data.tokenizers import ByteTokenizer

    if source == "synthetic":
        notes.append("tokenizer auto: byte, as each symbol of generated text is a byte or a few")
        return ByteTokenizer()
    try:
        tokenizer = _cached_bpe(AUTO_BPE, corpus, cache, notes)
    except DataError as error:
        notes.append(f"tokenizer auto: byte, as the text is small ({error})")
        return ByteTokenizer()
    notes.append(f"tokenizer auto: bpe-{AUTO_BPE}, trained on the training split")
    return tokenizer


def _cached_bpe(vocab_size: int, corpus: Corpus, cache: Path, notes: list[str]) -> Tokenizer:
    from data.tokenizers import LARGEST_BPE, SMALLEST_BPE, load_tokenizer, train_bpe

    if not SMALLEST_BPE <= vocab_size <= LARGEST_BPE:
        legal = min(max(vocab_size, SMALLEST_BPE), LARGEST_BPE)
        raise DataError(
            f"tokenizer is 'bpe-{vocab_size}': N counts the 256 bytes and end-of-text, so it is "
            f"{SMALLEST_BPE} to {LARGEST_BPE}. Nearest: bpe-{legal}."
        )
    path = cache / "tokenizers" / f"bpe-{vocab_size}-{corpus.fingerprint[:16]}-v{CACHE_FORMAT}.json"
    if path.exists():
        try:
            tokenizer = load_tokenizer(path)
            if tokenizer.vocab_size == vocab_size:
                return tokenizer
        except DataError as error:
            notes.append(f"rebuilt a damaged cache file: {error}")
    trained = train_bpe(corpus.train, vocab_size)
    try:
        trained.save(path)
    except OSError as error:
        notes.append(f"the tokenizer could not be cached: {error}")
    return trained


def _stores(
    corpus: Corpus, tokenizer: Tokenizer, cache: Path, notes: list[str]
) -> tuple[dict[str, TokenStore], Path | None]:
    from data.store import encode_documents, load_stores, save_stores

    sides = {"train": corpus.train, "heldout": corpus.heldout}
    folder = cache / "tokens" / f"{corpus.fingerprint[:16]}-{tokenizer.digest[:16]}-v{CACHE_FORMAT}"
    if (folder / "meta.json").exists():
        try:
            return load_stores(folder, list(sides), tokenizer), folder
        except DataError as error:
            notes.append(f"rebuilt: {error}")
    stores = {side: encode_documents(documents, tokenizer) for side, documents in sides.items()}
    try:
        tokenizer.save(folder / "tokenizer.json")
        save_stores(folder, stores)
    except OSError as error:
        notes.append(f"tokens could not be cached: {error}")
        return stores, None
    return stores, folder
