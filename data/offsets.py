"""Where the documents of packed rows begin, as kernels for documents of unequal lengths ask for it (`cu_seqlens`)."""

from __future__ import annotations

import numpy as np

__all__ = ["document_offsets"]

TOKENS_PER_DOCUMENT = 64  # of the room that is set aside from the start,
MIN_ROOM = 64  # and what it is at least: documents


def document_offsets(doc_ids: np.ndarray) -> np.ndarray:
    """(B, S) -> (N + 1,) int32: the first token of each document, rows laid end to end, then B S, repeated to the end.

    A row begins a document, whatever the row before it ended with; so does every change of id. Every token belongs to a
    document, and what is repeated at the end are empty ones.

    N depends on B and S alone, so that shapes, and what was compiled for them, stay from batch to batch: the power of
    two that holds B rows full of documents of `TOKENS_PER_DOCUMENT` tokens, `MIN_ROOM` at least. A batch of more
    documents gets the power of two that holds them.
    """
    rows, length = doc_ids.shape
    starts = np.ones((rows, length), dtype=bool)
    starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    first = np.flatnonzero(starts)
    usual = max(rows * -(-length // TOKENS_PER_DOCUMENT), MIN_ROOM)
    room = 1 << (max(usual, len(first)) - 1).bit_length()
    offsets = np.full(room + 1, rows * length, dtype=np.int32)
    offsets[: len(first)] = first
    return offsets
