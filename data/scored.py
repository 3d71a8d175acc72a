"""Which text a finished run is scored on: its own held-out text, that of another source, or all of some other text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from data import SOURCES, load_corpus, load_dataset, token_stores
from data.cache import cache_root
from data.config import DataConfig
from data.corpus import Corpus, Document, fingerprint
from data.errors import DataError
from data.kept import keep_text
from data.lost import lost_text
from data.mix import MixConfig, entries_of
from data.named import KINDS, FilesConfig, named_files
from data.near_copies import Overlap, compare, noted
from data.store import TokenStore, encode_documents
from data.stream import Stream
from data.text import TextConfig, input_path, read_whole

if TYPE_CHECKING:
    from data.tokenizers import Tokenizer

__all__ = ["Scored", "text_to_score"]

UNKNOWN = "what these weights were trained on is not known here; this text may have been among it"


class ScoredConfig(DataConfig, TextConfig, FilesConfig, MixConfig, Protocol):
    """A run whose text may be its user's own."""


@dataclass(frozen=True)
class Scored:
    """`whole`: no part of it was for training. `overlap`: with the text that the run was trained on."""

    store: TokenStore
    name: str
    whole: bool
    fingerprint: str
    overlap: Overlap | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'all' if self.whole else 'the held-out part'} of {self.name}"


def text_to_score(
    run: ScoredConfig | None,
    given: ScoredConfig,
    tokenizer: Tokenizer,
    trained_on: Mapping[str, str] | None = None,
    whole: bool = False,
) -> Scored:
    """What to score a run on that would read `run`, where `given` was asked for (the same one if nothing was). `run`
    None: weights of which nobody here knows what they were trained on.

    Files are scored whole, unless they are the run's own text: then only its held-out part was not seen. `trained_on`:
    what the run recorded of its data, "fingerprint" and (unless it is old) "content". `whole`: all of what
    `given` names to train on, be it the run's own.

    Raises:
        DataError: the text cannot be read or is empty.
    """
    if run and (part := _part_of_mix(run, given)):
        return _held_out(part, tokenizer, None, [])
    if not whole and (
        "input_file" not in SOURCES[given.data].reads
        or given is run
        or (run and _is_own(run, given, trained_on))
    ):
        recorded = trained_on if run and given.data == run.data else None
        # Files of the run are read as the run reads them: others may be held out of it by name.
        own = run if run and _same_files(run, given) else given
        return _held_out(own, tokenizer, recorded, [] if run else [UNKNOWN])
    documents, store, name, notes = _whole(given, tokenizer)
    overlap, shared = _shared_with(run, documents) if run else (None, (UNKNOWN,))
    return Scored(
        store=store,
        name=name,
        whole=True,
        fingerprint=fingerprint([], documents),
        overlap=overlap,
        notes=(*notes, *shared, *lost_text({"scored": store})),
    )


def _whole(
    given: ScoredConfig, tokenizer: Tokenizer
) -> tuple[Sequence[Document], TokenStore, str, Sequence[str]]:
    """All documents of the files, as tokens too; their name, and notes about them."""
    if given.data == "text":
        documents = read_whole(given)
        return documents, encode_documents(documents, tokenizer), input_path(given).name, ()
    stream: Stream | Corpus = SOURCES[given.data].load()(given)
    if not isinstance(stream, Stream):
        raise DataError(
            f"{stream.name} is a folder of prepare, of which a part is for training, and text is scored whole. Name "
            f"shards of it: input_file=<one of its val_*.bin>"
        )
    corpus = keep_text(stream.whole(), cache_root())
    notes = list(corpus.notes)
    stores, _ = token_stores(corpus, tokenizer, cache_root(), notes)
    return corpus.heldout, stores["heldout"], corpus.name, notes


def _held_out(
    cfg: ScoredConfig, tokenizer: Tokenizer, trained_on: Mapping[str, str] | None, notes: list[str]
) -> Scored:
    dataset = load_dataset(cfg, tokenizer=tokenizer)
    notes = [*dataset.notes, *notes]
    if (
        trained_on
        and dataset.fingerprint != trained_on["fingerprint"]
        and dataset.content != trained_on.get("content")
    ):
        notes.append(
            "the data is not what the run was trained on (the text, its files or this Python changed): this score does "
            "not compare with the run's own, and what is held out now may have been trained on"
        )
    return Scored(dataset.heldout, dataset.name, False, dataset.fingerprint, dataset.overlap, tuple(notes))


def _is_own(run: ScoredConfig, given: ScoredConfig, trained_on: Mapping[str, str] | None) -> bool:
    """Whether a text is what the run was trained on: it lies where that lay, or is it to the byte."""
    if _lies_where(run, given):
        return True
    try:
        corpus, _ = load_corpus(given, cache_root())
    except DataError:
        return False  # not even two parts can be made of it
    recorded = trained_on or {}
    named = corpus.fingerprint == recorded.get("fingerprint")
    return named or corpus.content == recorded.get("content")


def _part_of_mix(run: ScoredConfig, given: ScoredConfig) -> ScoredConfig | None:
    """The entry of the run's mixture whose files are given."""
    if run.data != "mix" or "input_file" not in SOURCES[given.data].reads:
        return None
    return next((entry.cfg for entry in entries_of(run) if _lies_where(entry.cfg, given)), None)


def _lies_where(run: ScoredConfig, given: ScoredConfig) -> bool:
    """Whether both name the same text on disk."""
    try:
        if run.data == "text" and input_path(run).samefile(input_path(given)):
            return True
    except DataError:
        pass  # the run's own text is gone
    return _same_files(run, given)


def _same_files(run: ScoredConfig, given: ScoredConfig) -> bool:
    """Whether both name the same files of one kind, whatever is held out of them."""
    if run.data != given.data or run.data not in KINDS:
        return False
    try:
        ours, theirs = (
            {path.resolve() for _, path in [*files.train, *(files.heldout or ())]}
            for files in (named_files(cfg, KINDS[cfg.data]) for cfg in (run, given))
        )
    except DataError:
        return False  # the run's own text is gone, or of the files given some are called as held-out text is
    return ours == theirs


def _shared_with(run: ScoredConfig, documents: Sequence[Document]) -> tuple[Overlap | None, tuple[str, ...]]:
    try:
        train = load_corpus(run, cache_root())[0].train
    except DataError as error:
        return None, (f"whether it stands in the text of the run was not looked at: {error}",)
    overlap = compare(train, documents)
    return overlap, tuple(noted(overlap, "this text"))
