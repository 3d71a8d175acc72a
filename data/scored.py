"""Which text a finished run is scored on: its own held-out text, that of another source, or all of some other text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from data import load_corpus, load_dataset
from data.cache import cache_root
from data.config import DataConfig
from data.corpus import Document, fingerprint
from data.errors import DataError
from data.lost import lost_text
from data.near_copies import Overlap, compare, noted
from data.store import TokenStore, encode_documents
from data.text import TextConfig, input_path, read_whole

if TYPE_CHECKING:
    from data.tokenizers import Tokenizer

__all__ = ["Scored", "text_to_score"]

UNKNOWN = "what these weights were trained on is not known here; this text may have been among it"


class ScoredConfig(DataConfig, TextConfig, Protocol):
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
) -> Scored:
    """What to score a run on that would read `run`, where `given` was asked for (the same one if nothing was). `run`
    None: weights of which nobody here knows what they were trained on.

    Files are scored whole, unless they are the run's own text: then only its held-out part was not seen. `trained_on`:
    what the run recorded of its data, "fingerprint" and (unless it is old) "content".

    Raises:
        DataError: the text cannot be read or is empty.
    """
    if given.data != "text" or given is run or (run and _is_own(run, given, trained_on)):
        recorded = trained_on if run and given.data == run.data else None
        return _held_out(given, tokenizer, recorded, [] if run else [UNKNOWN])
    documents = read_whole(given)
    overlap, notes = _shared_with(run, documents) if run else (None, (UNKNOWN,))
    store = encode_documents(documents, tokenizer)
    return Scored(
        store=store,
        name=input_path(given).name,
        whole=True,
        fingerprint=fingerprint([], documents),
        overlap=overlap,
        notes=(*notes, *lost_text({"scored": store})),
    )


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
    try:
        if run.data == "text" and input_path(run).samefile(input_path(given)):
            return True
    except DataError:
        pass  # the run's own text is gone
    try:
        corpus, _ = load_corpus(given, cache_root())
    except DataError:
        return False  # not even two parts can be made of it
    recorded = trained_on or {}
    named = corpus.fingerprint == recorded.get("fingerprint")
    return named or corpus.content == recorded.get("content")


def _shared_with(run: ScoredConfig, documents: list[Document]) -> tuple[Overlap | None, tuple[str, ...]]:
    try:
        train = load_corpus(run, cache_root())[0].train
    except DataError as error:
        return None, (f"whether it stands in the text of the run was not looked at: {error}",)
    overlap = compare(train, documents)
    return overlap, tuple(noted(overlap, "this text"))
