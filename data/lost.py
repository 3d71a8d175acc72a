"""Text that a tokenizer does not give back: how much, what for example, and what bits per byte then mean."""

from __future__ import annotations

import os.path
from collections.abc import Mapping

from data.store import TokenStore

__all__ = ["first_difference", "lost_text"]

SIDES = {"train": "training", "heldout": "held-out", "scored": "scored"}
REACH = 48  # characters in which two texts are expected to agree again
AGREEMENT = 3  # that many equal characters


def lost_text(stores: Mapping[str, TokenStore]) -> list[str]:
    """A sentence where the tokens of some document do not give its text back, else none."""
    lossy = {side: store for side, store in stores.items() if len(store.lossy_documents)}
    if not lossy:
        return []
    store = next(iter(lossy.values()))
    index = int(store.lossy_documents[0])
    before, after = first_difference(_shown(store.text(index)), _shown(store.said(index)))
    return [
        f"tokenizer {store.tokenizer.name} does not give all text back: "
        f"{' and '.join(_share(side, store) for side, store in lossy.items())} come back otherwise; for example "
        f"{before!r} became {repr(after) if after else 'nothing'}. Bits per byte are the nats of what the tokens say "
        f"over the bytes of the raw text: what is lost costs nothing, so the score does not compare with those of "
        f"other tokenizers"
    ]


def first_difference(before: str, after: str) -> tuple[str, str]:
    """Where two texts part, to where they agree again."""
    start = len(os.path.commonprefix([before, after]))
    before, after = before[start : start + REACH], after[start : start + REACH]
    for together in range(1, 2 * REACH):
        for kept in range(max(0, together - REACH), min(together, REACH) + 1):
            left, right = before[kept:], after[together - kept :]
            if left[:AGREEMENT] == right[:AGREEMENT] and (len(left) >= AGREEMENT or left == right):
                return before[:kept], after[: together - kept]
    return before, after


def _shown(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _share(side: str, store: TokenStore) -> str:
    lossy = store.lossy_documents
    documents = f"{len(lossy):,} of {store.n_docs:,} {SIDES[side]} documents"
    return f"{documents} ({int(store.doc_bytes[lossy].sum()):,} of {store.total_bytes:,} bytes)"
