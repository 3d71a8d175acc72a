"""Whether the bytes that a score is divided by are those of the text that was scored.

The score takes them from the sizes that were noted when the text was read, and by target from the lengths of the
vocabulary's tokens. Here the targets are put together again, window by window, decoded, and the bytes counted.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from data.rows import Batch, HeldoutRows
from data.tokenizers import Tokenizer, text_of
from trainer.bench.certify.checks import Check

__all__ = ["counting"]

AT_ONCE = 64  # rows that are put together at a time
NAMED = 3  # problems that are told


def counting(rows: HeldoutRows, tokenizer: Tokenizer, heard: Iterable[tuple[int, int]], bytes_: int) -> Check:
    """`heard`: of each row, its number and the bytes that the score took it for; `bytes_`: those of the whole score."""
    answers = rows.scores == "answers"
    asked = (
        "the tokens that were scored were put together window by window and decoded, and their bytes counted: of every "
        f"{'answer' if answers else 'document'} as many as the score is divided by, and no token twice or never"
    )
    pieces: dict[int, list[tuple[int, np.ndarray]]] = {}
    sizes = np.zeros(len(rows.documents), dtype=np.int64)
    for row, said in heard:
        sizes[rows.document_of[row]] += said
    for start in range(0, rows.n_rows, AT_ONCE):
        ids = np.arange(start, min(start + AT_ONCE, rows.n_rows))
        batch = rows.batch(ids)
        for number, tokens in zip(ids.tolist(), _scored(batch), strict=True):
            first = rows.targets_of(number).start
            pieces.setdefault(int(rows.document_of[number]), []).append((first, tokens))
    total, problems = 0, []
    for place in range(len(rows.documents)):
        index = int(rows.documents[place])
        found = sorted(pieces.get(place, []), key=lambda piece: piece[0])
        tokens = np.concatenate([part for _, part in found]) if found else np.zeros(0, dtype=np.int64)
        raw, wrong = _bytes_of(rows, tokenizer, index, tokens, answers)
        total += raw
        if wrong:
            problems.append(f"document {index}: {wrong}")
        elif raw != sizes[place]:
            problems.append(f"document {index} has {raw:,} bytes, and was scored as {sizes[place]:,}")
    if total != bytes_:
        problems.insert(0, f"the score is divided by {bytes_:,} bytes, and the text has {total:,}")
    measured = {"bytes": float(total), "documents": float(len(rows.documents))}
    found_ = f"{total:,} bytes in {len(rows.documents):,} documents, as the score says"
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        found_ = "; ".join(problems[:NAMED]) + more
    return Check("bytes", "failed" if problems else "passed", asked, "none", found_, measured)


def _scored(batch: Batch) -> list[np.ndarray]:
    """The targets of each row that count."""
    targets = batch.tokens[:, 1 : batch.weights.shape[1] + 1]
    return [row[counts] for row, counts in zip(targets, batch.weights > 0, strict=True)]


def _bytes_of(
    rows: HeldoutRows, tokenizer: Tokenizer, index: int, tokens: np.ndarray, answers: bool
) -> tuple[int, str]:
    """Bytes of one document, and what is wrong with the tokens that were scored of it. Of text they are all of its
    tokens, once each; where these do not give it back, the bytes are those of the text itself."""
    store = rows.store
    if answers:
        return len(tokenizer.decode(tokens)), ""
    own = np.asarray(store.tokens[store.offsets[index] : store.offsets[index + 1]]).astype(np.int64)
    if len(own) != len(tokens):
        return 0, f"{len(tokens):,} of its {len(own):,} tokens were scored"
    if (own != tokens).any():
        return 0, "other tokens than its own were scored"
    if store.lossy is not None and store.lossy[index]:
        return len(store.text(index)), ""
    return len(text_of(tokenizer, tokens)), ""
