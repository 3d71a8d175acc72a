"""Where tokens come from: corpora, tokenizers, the order of documents, rows, and the yardsticks of a score.

`load_dataset(cfg)` is the way in. Numpy only: adapters make tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.cache import cache_root
from data.errors import DataError
from naming import Entry, not_one_of

if TYPE_CHECKING:
    from data.config import DataConfig, Unit
    from data.corpus import Corpus, TrueModel
    from data.mix_texts import Mixture
    from data.near_copies import Overlap
    from data.rows import TrainingRows
    from data.store import TokenStore
    from data.tokenizers import Tokenizer

__all__ = [
    "SOURCES",
    "TOKENIZERS",
    "DataError",
    "Dataset",
    "Source",
    "TokenizerKind",
    "load_corpus",
    "load_dataset",
    "readers",
    "source_of",
    "token_stores",
    "unheard",
]


@dataclass(frozen=True)
class Source(Entry):
    """Where text comes from. `factory` is `(cfg) -> Corpus`, or `(cfg) -> Stream` where the text may be larger than
    memory (`data/stream.py`); that of a mixture is `(cfg) -> Mix` (`data/mix.py`).

    `needs` are those of its fields that must be set, each with what it takes: "input_file=<file or folder>"; where one
    of several will do, all stand in one entry. `absolute` is `(cfg) -> {field: value}`, the fields with paths that mean
    the same from any folder; DataError where there is nothing. `suffixes`: how the names of its files end, where they
    are of one kind.
    `tokenizer` is what `auto` means for it, and `tokenizer_why` says why; `tokenizer_field` names a field of its own
    that says so instead where it is set, and else `tokenizer_file`, `(cfg) -> path or None`, the one that its text has.
    `near_copies` is what that field means where it is not set; None: held-out
    text is not compared with the training text, as both are drawn independently.
    """

    needs: tuple[str, ...] = ()
    absolute: str = ""
    suffixes: tuple[str, ...] = ()
    tokenizer: str = "bpe-1024"
    tokenizer_why: str = "trained on the training split"
    tokenizer_field: str = ""
    tokenizer_file: str = ""
    near_copies: Literal["drop", "keep"] | None = "keep"


@dataclass(frozen=True)
class TokenizerKind(Entry):
    """A kind of tokenizer: the key is also its `type` in a saved file. `factory` is a class with

    - `vocabulary_size(size)`: the number of ids; DataError with the nearest legal size,
    - `from_content(content)`: one from the mapping that its `save` wrote,
    - `train(documents, size)` if `trained`, `fetch(cache)` if `published`, else a constructor without arguments,

    that meets `data.tokenizers.Tokenizer`. A trained kind is cached, and written `<kind>-<size>` where it is `sized`. A
    published one is a file that is looked for and else downloaded. One that is not `named` comes from a file alone and
    needs `from_content` only.
    """

    trained: bool = False
    sized: bool = False
    published: bool = False
    named: bool = True


# `data=<name>`
SOURCES: dict[str, Source] = {
    "embedded": Source(
        "data.embedded:load",
        (),
        "the source of the Python standard library on this disk",
        near_copies="drop",
    ),
    "text": Source(
        "data.text:load",
        ("input_file", "data_root", "val_files", "document_separator"),
        "your own text",
        needs=("input_file=<file or folder>",),
        absolute="data.text:absolute",
    ),
    "jsonl": Source(
        "data.jsonl:load",
        ("train_files", "input_file", "data_root", "val_files", "text_field"),
        "files of JSON lines, also compressed, of any size",
        needs=("train_files=<files> or input_file=<file or folder>",),
        absolute="data.jsonl:absolute",
        suffixes=(".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst"),
    ),
    "parquet": Source(
        "data.parquet:load",
        ("train_files", "input_file", "data_root", "val_files", "text_field"),
        "files of Apache Parquet, of any size",
        needs=("train_files=<files> or input_file=<file or folder>",),
        absolute="data.parquet:absolute",
        suffixes=(".parquet",),
    ),
    "bin": Source(
        "data.bin:load",
        ("train_files", "input_file", "data_root", "val_files", "shards_tokenizer"),
        "token shards: a folder of prepare, or as llm.c, modded-nanogpt, nanoGPT and Megatron write them",
        needs=("train_files=<files> or input_file=<file or folder>",),
        absolute="data.bin:absolute",
        suffixes=(".bin",),
        tokenizer="gpt2",
        tokenizer_why="as the shards have it",
        tokenizer_field="shards_tokenizer",
        tokenizer_file="data.prepared:prepared_tokenizer",
    ),
    "fineweb10B": Source(
        "data.bin:load_public",
        ("data_root", "shards_tokenizer"),
        "FineWeb's public shards of GPT-2 ids",
        absolute="data.bin:absolute_public",
        tokenizer="gpt2",
        tokenizer_why="as the shards have it",
        tokenizer_field="shards_tokenizer",
    ),
    "finewebedu10B": Source(
        "data.bin:load_public",
        ("data_root", "shards_tokenizer"),
        "FineWeb-Edu's",
        absolute="data.bin:absolute_public",
        tokenizer="gpt2",
        tokenizer_why="as the shards have it",
        tokenizer_field="shards_tokenizer",
    ),
    "hf": Source(
        "data.huggingface.sets:load",
        (
            *("dataset_name", "data_root", "dataset_subset", "dataset_split", "eval_split"),
            *("dataset_bytes", "text_field"),
        ),
        "data sets of Hugging Face: a folder, or a name of the hub",
        needs=("dataset_name=<folder or name>",),
        absolute="data.huggingface.sets:absolute",
    ),
    "mix": Source(
        "data.mix:load",
        ("mix",),
        "several of these, mixed by weight",
        needs=("mix=[{data: <source>, weight: <share>}, ...]",),
        absolute="data.mix:absolute",
        tokenizer_why="trained on the mixture",
    ),
    "synthetic": Source(
        "data.synthetic:load",
        (
            *("synthetic", "synthetic_bytes", "synthetic_symbols", "synthetic_order", "synthetic_pairs"),
            *(
                "synthetic_rounds",
                "synthetic_keys",
                "synthetic_values",
                "synthetic_min_distance",
                "synthetic_max_distance",
            ),
        ),
        "generated text of exactly known entropy",
        tokenizer="byte",
        tokenizer_why="as each symbol of generated text is a byte or a few",
        near_copies=None,
    ),
}
# `tokenizer=<kind>`, or `<kind>-<N>` where it is sized; besides them `auto` and the path of a saved one
TOKENIZERS: dict[str, TokenizerKind] = {
    "byte": TokenizerKind("data.tokenizers:ByteTokenizer", (), "the 256 bytes"),
    "bpe": TokenizerKind(
        "data.bpe:BpeTokenizer", (), "byte-level BPE of N ids, trained on your text", trained=True, sized=True
    ),
    "char": TokenizerKind(
        "data.char:CharTokenizer", (), "the characters of your text; bytes for all others", trained=True
    ),
    "gpt2": TokenizerKind("data.published:Gpt2", (), "GPT-2's, 50,257 ids", published=True),
    "r50k_base": TokenizerKind("data.published:Gpt2", (), "another name of gpt2", published=True),
    "cl100k_base": TokenizerKind("data.published:Cl100kBase", (), "GPT-4's, 100,277 ids", published=True),
    "o200k_base": TokenizerKind("data.published:O200kBase", (), "GPT-4o's, 200,019 ids", published=True),
    "huggingface": TokenizerKind(
        "data.huggingface.tokenizer:HuggingFaceTokenizer",
        (),
        "a tokenizer.json of Hugging Face, which comes with its model",
        named=False,
    ),
}
CACHE_FORMAT = 1  # part of every cache key: raise it when tokens or tokenizers would come out differently


def readers(field: str) -> list[str]:
    """Names of the sources that read a generic field."""
    return [name for name, source in SOURCES.items() if field in source.reads]


def source_of(field: str, value: object) -> str:
    """The source that a generic field alone means: the one whose files what it names is called like, else the first
    that reads the field."""
    named = str(value[0] if isinstance(value, list | tuple) and value else value).lower()
    those = readers(field)
    return next((name for name in those if named.endswith(SOURCES[name].suffixes or ("\0",))), those[0])


@dataclass(frozen=True)
class Dataset:
    """A corpus as tokens. `fingerprint` is that of the text and its split, whatever the tokenizer; `content` that
    of the text without its names. Of a mixture they are also those of its weights.

    `truth` and `entropy_bits_per_byte` are set for synthetic text only. `notes` are sentences for the user.
    `overlap`: what the held-out documents share with the training text, None where that is not measured.
    `packing`: whether rows are filled up, or each has one document.
    `cache_path` is the folder that holds the token arrays, None where no cache could be written.
    """

    tokenizer: Tokenizer
    train: TokenStore
    heldout: TokenStore
    fingerprint: str
    content: str
    name: str
    entropy_bits_per_byte: float | None = None
    truth: TrueModel | None = None
    notes: tuple[str, ...] = ()
    overlap: Overlap | None = None
    cache_path: Path | None = None
    mixture: Mixture | None = None
    packing: bool = True

    @property
    def chats(self) -> bool:
        """Whether its documents are chats, of which the answers are learned."""
        from data.chats.store import ChatStore

        return isinstance(self.train, ChatStore)

    def training_rows(self, seq_len: int, lookahead: int = 1, seed: int = 0) -> TrainingRows:
        """What steps train on. DataError where the text is too short for one row."""
        from data.chats.rows import WholeRows
        from data.mix_rows import MixedRows
        from data.rows import TrainingRows

        eot = self.tokenizer.eot
        if self.chats or not self.packing:
            return WholeRows(self.train, eot, seq_len, lookahead, seed, self.packing)
        if self.mixture is None:
            return TrainingRows(self.train, eot, seq_len, lookahead, seed)
        return MixedRows(self.train, eot, seq_len, self.mixture, lookahead, seed)

    def identity(self) -> dict[str, Any]:
        """What tells whether a run that goes on reads the same text, as JSON."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "content": self.content,
            "documents": self.train.n_docs + self.heldout.n_docs,
            "bytes": self.train.total_bytes + self.heldout.total_bytes,
        }


def unheard(text: str) -> None:
    """For `tell`, where nobody listens."""


def load_dataset(
    cfg: DataConfig,
    *,
    unit: Unit = "token",
    cache_dir: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    tell: Callable[[str], object] = unheard,
) -> Dataset:
    """Read `cfg.data`, tokenise it (or map the cached tokens) and split it.

    Args:
        cfg: a run; besides the fields of `DataConfig`, those that its source reads.
        unit: what the architecture reads; with "byte" the tokenizer is that of single bytes.
        cache_dir: instead of `data.cache.cache_root()`.
        tokenizer: instead of the one `cfg.tokenizer` names (a checkpoint's own, for resuming and scoring).
        tell: called with what is being done, as it changes: all of it may take long.

    Raises:
        DataError: the text or tokenizer cannot be used as asked, or the text is too short for one row.
    """
    from data.lost import lost_text
    from data.mix_texts import told
    from data.tokenizer_choice import make_tokenizer

    cache = Path(cache_dir) if cache_dir is not None else cache_root()
    corpus, overlap = load_corpus(cfg, cache, tell)
    notes = list(corpus.notes)
    if tokenizer is None:
        tell(f"making the tokenizer ({cfg.tokenizer})")
        tokenizer = make_tokenizer(cfg, unit, corpus, cache, notes)
    tell("turning the text into tokens")
    stores, folder = token_stores(corpus, tokenizer, cache, notes)
    notes += lost_text(stores)
    mixture = corpus.mixture
    sources = tuple(zip(mixture.names, mixture.heldout, strict=True)) if mixture else ()
    stores["heldout"] = replace(stores["heldout"], marks=corpus.marks, sources=sources)
    fingerprint, content = told(corpus)
    dataset = Dataset(
        tokenizer=tokenizer,
        train=stores["train"],
        heldout=stores["heldout"],
        fingerprint=fingerprint,
        content=content,
        name=corpus.name,
        entropy_bits_per_byte=corpus.truth.entropy_bits_per_byte if corpus.truth else None,
        truth=corpus.truth,
        notes=tuple(notes),
        overlap=overlap,
        cache_path=folder,
        mixture=mixture,
        packing=cfg.packing,
    )
    rows = dataset.training_rows(cfg.train_seq_len)  # refuses a text too short for one row
    return replace(dataset, notes=(*notes, *rows.notes))


def load_corpus(
    cfg: DataConfig, cache: Path, tell: Callable[[str], object] = unheard, *, measure: bool = True
) -> tuple[Corpus, Overlap | None]:
    """The text that `cfg.data` names, as `cfg.near_copies` wants it, and what was measured for that (`measure`)."""
    from data.near_copies import heed

    if cfg.data not in SOURCES:
        raise DataError(f"data: {not_one_of(cfg.data, SOURCES)}")
    corpus, default = _read(cfg, cache, tell)
    if default is None or not measure:
        return corpus, None
    tell("looking for held-out text in the training text")
    return heed(corpus, cfg.near_copies or default, cache)


def _read(
    cfg: DataConfig, cache: Path, tell: Callable[[str], object]
) -> tuple[Corpus, Literal["drop", "keep"] | None]:
    """The text of a source, or of all sources of a mixture, and what `near_copies` means where it is not set: a mixture
    drops where one of its sources would."""
    from data.kept import keep_text
    from data.mix import Mix
    from data.mix_texts import join
    from data.stream import Stream

    tell("reading the text")
    found: Corpus | Stream | Mix = SOURCES[cfg.data].load()(cfg)
    if isinstance(found, Mix):
        read = [_read(entry.cfg, cache, tell) for entry in found.entries]
        return join(found, [one for one, _ in read]), "drop" if "drop" in [d for _, d in read] else "keep"
    if isinstance(found, Stream):
        found = keep_text(found, cache, tell)
    return found, SOURCES[cfg.data].near_copies


def token_stores(
    corpus: Corpus, tokenizer: Tokenizer, cache: Path, notes: list[str]
) -> tuple[dict[str, TokenStore], Path | None]:
    """The tokens of both sides, from the cache or written there, and their folder; None where there is no cache."""
    from data.corpus import Texts
    from data.shard_text import InShards
    from data.store import encode_documents, load_stores, write_stores

    if corpus.chats:
        return _chat_stores(corpus, tokenizer, cache, notes)
    sides = {"train": corpus.train, "heldout": corpus.heldout}
    # Ids that stay in their files are of these files.
    keys = [s.key for s in sides.values() if isinstance(s, InShards) and s.is_of(tokenizer)]
    shards = f"-{'-'.join(keys)}" if keys else ""
    folder = cache / "tokens" / f"{corpus.fingerprint[:16]}-{tokenizer.digest[:16]}{shards}-v{CACHE_FORMAT}"
    if stores := _cached(folder, lambda: load_stores(folder, list(sides), tokenizer), notes):
        return stores, folder
    try:
        tokenizer.save(folder / "tokenizer.json")
        write_stores(folder, sides, tokenizer)
        stores = _held(folder, lambda: load_stores(folder, list(sides), tokenizer, check=False))
        if isinstance(corpus.train, Texts):
            size = sum(store.tokens.nbytes for store in stores.values())
            written = f"written to the cache: {size:,} bytes in {folder}"
            notes.append("tokens are read from their shards" if keys else f"tokens {written}")
        return stores, folder
    except OSError as error:
        if isinstance(corpus.train, Texts):  # more than memory holds, perhaps
            raise DataError(
                f"the tokens of {corpus.name} cannot be written to {folder}: {error.strerror or error}. Set "
                f"MYTRAINER_CACHE=<folder with room>, or make room there"
            ) from error
        notes.append(f"tokens could not be cached: {error}")
    return {side: encode_documents(documents, tokenizer) for side, documents in sides.items()}, None


def _cached(
    folder: Path, load: Callable[[], dict[str, TokenStore]], notes: list[str]
) -> dict[str, TokenStore] | None:
    """What a folder of the cache holds, None where there is none, or nothing sound."""
    if (folder / "meta.json").exists():
        try:
            return _held(folder, load)
        except DataError as error:
            notes.append(f"rebuilt: {error}")
    return None


def _held(folder: Path, load: Callable[[], dict[str, TokenStore]]) -> dict[str, TokenStore]:
    """What a folder of the cache holds, which is not deleted while any of it is read."""
    from data.held import hold

    held = hold(folder)
    return {side: replace(store, held=held) for side, store in load().items()}


def _chat_stores(
    corpus: Corpus, tokenizer: Tokenizer, cache: Path, notes: list[str]
) -> tuple[dict[str, TokenStore], Path | None]:
    """The same of chats, by the tokenizer's template."""
    from data.chats.store import encode_chats, load_chats, write_chats
    from data.chats.template import ChatTemplate

    template = ChatTemplate(tokenizer)
    notes.append(
        f"chats are written as {template.name} has it; the answers and the tokens that end them are learned"
    )
    sides = {"train": corpus.train, "heldout": corpus.heldout}
    key = f"{corpus.fingerprint[:16]}-{tokenizer.digest[:16]}-chats-{template.digest[:16]}-v{CACHE_FORMAT}"
    folder = cache / "tokens" / key
    if stores := _cached(folder, lambda: load_chats(folder, list(sides), template), notes):
        return stores, folder
    try:
        tokenizer.save(folder / "tokenizer.json")
        write_chats(folder, sides, template)
        return _held(folder, lambda: load_chats(folder, list(sides), template)), folder
    except OSError as error:
        notes.append(f"tokens could not be cached: {error}")
    return {side: encode_chats(documents, template) for side, documents in sides.items()}, None
