"""What a model did with a short sample of a text, as plain values: kept beside a score, drawn by `trainer.view`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from data.rows import select_heldout
from trainer.evaluate import evaluating
from trainer.precision import autocast

if TYPE_CHECKING:
    from adapters.base import Annotation, Map, ModelAdapter
    from data.store import TokenStore

__all__ = ["annotate", "annotation_of", "sample"]

MAX_BYTES = 600  # of a sample: what one reads
LEAST_BYTES = 200  # of the document that it is from, where one has so many


def sample(store: TokenStore, context: int) -> str:
    """The beginning of a document: no more than `MAX_BYTES`, and than fit with the start token into `context` tokens.
    The same for equal documents, whatever the run."""
    documents = select_heldout(store)
    long = documents[store.doc_bytes[documents] >= LEAST_BYTES]
    chosen = long[0] if len(long) else documents[store.doc_bytes[documents].argmax()]
    # A cut may have gone through a character.
    text = store.text(int(chosen))[:MAX_BYTES].decode("utf-8", errors="ignore")
    ends = store.tokenizer.spans(text)[:, 1]
    if len(ends) < context:
        return text
    return text.encode()[: int(ends[: context - 1].max(initial=0))].decode("utf-8", errors="ignore")


@torch.no_grad()
def annotate(adapter: ModelAdapter, text: str | bytes, precision: str) -> Annotation:
    """What the adapter has to show of a text. ValueError where that is not of this text."""
    # Eager, as scores are: what is compiled for training does not run hooks.
    with (
        evaluating(adapter),
        autocast(precision, adapter.device),
        torch.compiler.set_stance("force_eager"),
    ):
        found = adapter.annotate(text)
    found.check(len(adapter.tokenizer.encode(text)))
    return found


def annotation_of(adapter: ModelAdapter, store: TokenStore, context: int, precision: str) -> dict[str, Any]:
    """Of the sample of a store, as annotation.json has it; {} where the adapter has nothing to show.

    `text`; `tokens`, where the bytes of each begin and end in it; `spans` and `maps` as `adapters.annotation` has them,
    a span as [start, end, label].
    """
    text = sample(store, context)
    found = annotate(adapter, text, precision)
    if not found:
        return {}
    return {
        "text": text,
        "tokens": adapter.tokenizer.spans(text).tolist(),
        "spans": [
            {"name": one.name, "spans": [[span.start, span.end, span.label] for span in one.spans]}
            for one in found.spans
        ],
        "maps": [_plain(of) for of in found.maps],
    }


def _plain(of: Map) -> dict[str, Any]:
    return {
        "name": of.name,
        "rows": of.rows,
        "columns": of.columns,
        "row_labels": of.row_labels,
        "column_labels": of.column_labels,
        "values": [[float(f"{value:.4g}") for value in row] for row in of.values.double().tolist()],
    }
