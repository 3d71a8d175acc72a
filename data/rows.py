"""Rows of tokens: what a step trains on and what an evaluation scores. Both are functions of a row id.

B rows, S scored positions, n look-ahead: a row is 1 context token + S targets + (n - 1) more, so S + n
tokens; inputs are tokens[:, :S], next-token targets tokens[:, 1 : S + 1].
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from data.errors import DataError
from data.order import first_documents, reading_place
from data.places import Pieces, Places, StreamPlaces, spread
from data.shards import ShardTokens, each
from data.store import TokenStore
from data.tokenizers import Tokenizer

EVALUATION_SEED = 0  # the order in which `val_bytes` picks held-out documents: fixed, whatever the run's seed


@dataclass(frozen=True)
class Batch:
    """Rows as arrays. A document's id covers its start token and its text, and restarts at 0 in each row."""

    tokens: np.ndarray  # (B, S + n) int64
    doc_ids: np.ndarray  # (B, S + n) int32
    weights: np.ndarray  # (B, S) float32, 1 = the target counts
    end_weights: np.ndarray  # (B, S) float32, 1 = a document-end target (held-out rows only)
    rows: np.ndarray  # (B,) int64 global row ids
    bytes: int  # UTF-8 bytes of the targets that count
    sizes: np.ndarray | None = None  # (B, S) int64, those bytes by target (held-out rows only)
    # By the name of a mark: (B, S) bool, the targets that it marks (held-out rows only).
    marked: dict[str, np.ndarray] = field(default_factory=dict)
    chats: bool = (
        False  # whether documents are chats: what stands before the first target that counts is given
    )


def target_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Bytes (B, S) that the targets of rows (B, S + 1) say; what a tokenizer puts in front of a text is none of it.
    `TokenStore.raw_sizes` makes them bytes of the text."""
    sizes = tokenizer.token_bytes.take(tokens[:, 1:])
    if not tokenizer.lead:
        return sizes
    first = tokens[:, :-1] == tokenizer.eot
    return np.where(first, np.maximum(sizes - len(tokenizer.lead), 0), sizes)


class TrainingRows:
    """Rows of seq_len targets over the endless stream of epochs.

    An epoch is every document behind its start token, `[EOT] doc [EOT] doc ...`, in this epoch's order: N
    tokens. Its rows advance by seq_len, so each token but the first is a target exactly once; the (N - 1) %
    seq_len targets of the last partial row are dropped. Global row g is visit g % R of epoch g // R, with R =
    `rows_per_epoch`; `reading_place` says which row of the stream that is. Look-ahead beyond an epoch's end
    reads start tokens, each a document of its own.

    Raises:
        DataError: the text is too short for one row.
    """

    def __init__(self, store: TokenStore, eot: int, seq_len: int, lookahead: int = 1, seed: int = 0):
        self.store, self.eot, self.seq_len, self.lookahead = store, eot, seq_len, lookahead
        self._places = self._places_of(store, seed)
        self._token_bytes = store.tokenizer.token_bytes.astype(np.uint32)  # half as much to go through
        self.tokens_per_epoch = self._places.tokens_per_epoch
        self.rows_per_epoch = (self.tokens_per_epoch - 1) // seq_len
        if self.rows_per_epoch < 1:
            raise DataError(
                f"the training text is too short for one row: it has {self.tokens_per_epoch} tokens "
                f"(start tokens included), and train_seq_len {seq_len} needs {seq_len + 1}. "
                f"The largest train_seq_len for it is {max(self.tokens_per_epoch - 1, 0)}."
            )

    def batch(self, rows: np.ndarray) -> Batch:
        """The given global rows (B,), in the given order.

        Raises:
            DataError: a file of tokens is not as it was when it was opened.
        """
        rows = np.asarray(rows, dtype=np.int64)
        shape = (len(rows), self.seq_len + self.lookahead)
        ids = np.full(shape, self.eot, dtype=self.store.tokenizer.dtype)
        doc_ids = np.empty(shape, dtype=np.int32)
        epochs, visits = self._visits(rows)
        text = []
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            length = self._length(int(epoch))
            begins = reading_place(visits[here], (length - 1) // self.seq_len) * self.seq_len
            pieces = self._places.pieces(int(epoch), begins, shape[1])
            doc_ids[here] = self._numbered(pieces, begins, shape[1], length)
            pieces = pieces._replace(row=here[pieces.row])
            text.append(self._text(pieces, shape[1]))
        self._read(ids, stretches := np.concatenate(text, axis=1))
        tokens = ids.astype(np.int64)
        scored = self._bytes(tokens, stretches)
        weights = np.ones((len(rows), self.seq_len), dtype=np.float32)
        ends = np.zeros(weights.shape, dtype=np.float32)
        return Batch(tokens, doc_ids, weights, ends, rows, scored)

    def _numbered(self, pieces: Pieces, begins: np.ndarray, width: int, length: int) -> np.ndarray:
        """Which document of its row each position is of (B, width) int32, in an epoch of so many tokens."""
        counts = np.bincount(pieces.row, minlength=len(begins))
        nth = np.arange(len(pieces.row)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = pieces.row * width + np.maximum(pieces.start, 0)
        widths = np.diff(first, append=len(begins) * width)
        found = np.repeat(nth.astype(np.int32), widths).reshape(len(begins), width)
        for row in np.flatnonzero(begins + width > length):  # look-ahead beyond the end
            end = length - int(begins[row])
            found[row, end:] = found[row, end - 1] + 1 + np.arange(width - end)
        return found

    def _text(self, pieces: Pieces, width: int) -> np.ndarray:
        """Stretches of text in rows of `width` columns (4, K) int64: where each begins in the rows laid end to end, its
        document and where in that it begins, and how long it is."""
        first = pieces.start + 1  # column of the document's first token
        column = np.maximum(first, 0)
        end = np.minimum(first + self.store.lengths_of(pieces.document), width)
        found = [pieces.row * width + column, pieces.document, column - first, end - column]
        return np.stack(found)[:, end > column]

    def _read(self, tokens: np.ndarray, text: np.ndarray) -> None:
        """Put stretches of text into rows (B, S + n)."""
        if isinstance(self.store.tokens, ShardTokens):
            self.store.tokens.read_into(tokens.reshape(-1), *text)
        else:
            there, place = self._each(text)
            tokens.reshape(-1)[there] = self.store.tokens[place]

    def _each(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of stretches (4, K) each position: in the rows laid end to end, and in the text."""
        there, document, within, counts = text
        return each(there, counts)[1], each(self.store.offsets[document] + within, counts)[1]

    def _bytes(self, tokens: np.ndarray, text: np.ndarray) -> int:
        """Bytes of the targets of rows (B, S + n) that hold these stretches of text."""
        if self.store.lossy is None and not self.store.tokenizer.lead:  # what tokens say is the text
            said = self._token_bytes.take(tokens)
            # Start tokens say nothing; no targets are the first column and the look-ahead.
            return int(said.sum(dtype=np.int64) - said[:, 0].sum() - said[:, self.seq_len + 1 :].sum())
        sizes = target_bytes(tokens[:, : self.seq_len + 1], self.store.tokenizer)
        places = np.full(tokens.shape, -1, dtype=np.int64)  # in the text
        there, place = self._each(text)
        places.reshape(-1)[there] = place
        places = places[:, 1 : self.seq_len + 1]
        of_text = places >= 0
        return int(self.store.raw_sizes(places[of_text], sizes[of_text]).sum())

    def changed_length(self, seq_len: int, position: int) -> tuple[float, float]:
        """Shares of the running epoch's targets that are read twice and never, when rows of `seq_len` give way to these
        after `position` targets. The readers of `reading_place` then stand elsewhere, each by less than a long row."""
        before = (self.tokens_per_epoch - 1) // seq_len  # rows of an epoch
        epoch, visits = divmod(position // seq_len, before)
        begins = -(-position // self.seq_len) - epoch * self.rows_per_epoch
        return read_again(self.tokens_per_epoch - 1, (seq_len, visits), (self.seq_len, begins))

    def change_of_length(self, seq_len: int, position: int) -> str:
        """What `changed_length` finds, in words."""
        twice, never = self.changed_length(seq_len, position)
        return (
            f"with rows of another length {twice:.1%} of this epoch's text is read twice, {never:.1%} never"
        )

    def position_of(self, row: int) -> int:
        """What has been served before a row: of a stream, targets."""
        return row * self.seq_len

    def row_at(self, position: int) -> int:
        """The row that a run goes on with from there."""
        return -(-position // self.seq_len)

    def rows_of(self, epochs: float) -> float:
        """Rows of so many epochs from the first on."""
        return epochs * self.rows_per_epoch

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the text no row has, in words."""
        return ()

    def set_length(self, targets: int, epochs: float | None = None) -> None:
        """How many targets a run reads, as passes over the text too where it is that long; what is read of one text
        does not depend on it."""

    def _places_of(self, store: TokenStore, seed: int) -> Places:
        return StreamPlaces(store.offsets, seed)

    def _visits(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and visit number of global rows, each (B,)."""
        return np.divmod(rows, self.rows_per_epoch)

    def _length(self, epoch: int) -> int:
        """Tokens of an epoch, start tokens included."""
        return self.tokens_per_epoch


def read_again(targets: int, before: tuple[int, int], after: tuple[int, int]) -> tuple[float, float]:
    """Shares of an epoch of so many targets that are read twice and never. `before`: length of a row, and visits made
    with it; `after`: length, and the visit from which on rows of that one are read."""
    (old, visits), (new, begins) = before, after
    n_old, n_new = targets // old, targets // new
    rest = np.arange(np.clip(begins, 0, n_new), n_new)
    unread = np.zeros(n_new + 1, dtype=np.int64)  # 1 = a row that is still to come; beyond: none
    unread[reading_place(rest, n_new)] = 1
    sums = np.concatenate([[0], np.cumsum(unread)]) * new

    def to_come(first: np.ndarray) -> np.ndarray:
        """How many of the stream's first targets are still to come."""
        row, within = np.divmod(np.minimum(first, n_new * new), new)
        return sums[row] + unread[row] * within

    starts = reading_place(np.arange(visits), n_old) * old
    twice = int((to_come(starts + old) - to_come(starts)).sum())
    read = visits * old + len(rest) * new
    return twice / targets, (targets - read + twice) / targets


def select_heldout(store: TokenStore, max_bytes: int | None = None) -> np.ndarray:
    """Indices of the documents that are scored, in a fixed order that no seed or tokenizer changes.

    With `max_bytes`: as many documents of that order as fit whole, at least one.
    """
    limit = store.total_bytes if max_bytes is None else max_bytes
    return first_documents(store.doc_bytes, EVALUATION_SEED, limit)


class HeldoutRows:
    """Held-out documents scored whole, each from its start token: a row is a window of seq_len targets.

    A window begins with the last token of the one before as context. A document's last target is its end,
    with weight 0 and end weight 1. Rows are sorted by length, longest first, and a batch is as wide as its
    longest row.

    `max_bytes` and `max_documents` select whole documents (the score stays comparable between runs that agree on them);
    `max_tokens` cuts the list of windows, and `complete` is False where it cut. `total_bytes` is what the
    rows score together, and `scores` says of what. `sources`: by the name of each source of a mixture, which of
    `documents` are of it (n,) bool.
    """

    scores: Literal["text", "answers"] = "text"

    def __init__(
        self,
        store: TokenStore,
        eot: int,
        seq_len: int,
        max_bytes: int | None = None,
        max_tokens: int | None = None,
        lookahead: int = 1,
        max_documents: int | None = None,
    ):
        self.store, self.eot, self.seq_len, self.lookahead = store, eot, seq_len, lookahead
        self.documents = select_heldout(store, max_bytes)[:max_documents]
        if not len(self.documents):
            raise DataError("there is no held-out text to score.")
        source = np.repeat(np.arange(len(store.sources)), [documents for _, documents in store.sources])
        self.sources = {
            name: source[self.documents] == place for place, (name, _) in enumerate(store.sources)
        }
        targets = store.lengths_of(self.documents) + 1  # the document's end is one
        document, first, length = self._windows(targets)
        keep = len(length)
        if max_tokens is not None:
            keep = max(1, int(np.searchsorted(np.cumsum(length), max_tokens, side="right")))
        self.complete = keep >= len(length)
        by_length = np.argsort(-length[:keep], kind="stable")
        self.document_of = document[:keep][by_length]  # (n_rows,) index into `documents`
        self._document = self.documents[self.document_of]
        self._first = first[:keep][by_length]  # targets of the document before this window
        self._length = length[:keep][by_length]
        # Documents of which the tokens do not give the text back: their nats are of less than their bytes.
        self.lossy_documents = int(np.isin(self.documents, store.lossy_documents).sum())
        self.n_rows = keep
        self.n_targets = int(self._length.sum())
        self.total_bytes = self._count_bytes()

    def _windows(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of documents of so many targets (n,), each window (w,): which document's it is, how many of its targets come
        before, and how many it has."""
        windows = -(-targets // self.seq_len)
        document, nth = spread(windows)
        first = nth * self.seq_len
        return document, first, np.minimum(targets[document] - first, self.seq_len)

    def _count_bytes(self) -> int:
        if self.complete:
            return int(self.store.doc_bytes[self.documents].sum())
        every = (self.batch(np.arange(row, min(row + 64, self.n_rows))) for row in range(0, self.n_rows, 64))
        return sum(batch.bytes for batch in every)

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """(n, 16) uint8: what each of `documents` is known by whatever the tokenizer, half the SHA-256 of its text."""
        found = [hashlib.sha256(self.store.text(int(index))).digest()[:16] for index in self.documents]
        return np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, 16)

    def targets_of(self, row: int) -> slice:
        """Which targets of its document a row scores: tokens of the text, from 0, and behind them the end."""
        first = int(self._first[row])
        return slice(first, first + int(self._length[row]))

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows by number, 0 to n_rows - 1. Row -1 is padding: nothing in it counts (uneven processes)."""
        rows = np.asarray(rows, dtype=np.int64)
        padding = rows < 0
        document, first = self._document[rows], self._first[rows]
        length = np.where(padding, 0, self._length[rows])
        width = max(1, int(length.max(initial=0)))
        total = self.store.lengths_of(document)  # tokens of the document
        # Position 0 is the start token, 1 to `total` the text, then its end; beyond that, ends of nothing.
        positions = first[:, None] + np.arange(width + self.lookahead)  # (B, width + n)
        is_text = (positions >= 1) & (positions <= total[:, None]) & ~padding[:, None]
        index = self.store.offsets[document][:, None] + positions - 1
        tokens = np.full(positions.shape, self.eot, dtype=np.int64)
        tokens[is_text] = self.store.tokens[index[is_text]]
        doc_ids = np.maximum(positions - total[:, None], 0).astype(np.int32)
        counts = np.arange(width) < length[:, None]
        scored = counts & is_text[:, 1 : width + 1]
        sizes = np.where(scored, target_bytes(tokens[:, : width + 1], self.store.tokenizer), 0)
        sizes[scored] = self.store.raw_sizes(index[:, 1 : width + 1][scored], sizes[scored])
        marked = {name: np.zeros(scored.shape, dtype=bool) for name in self.store.marked}
        for name, where in marked.items():
            where[scored] = self.store.marked[name][index[:, 1 : width + 1][scored]]
        return Batch(
            tokens=tokens,
            doc_ids=doc_ids,
            weights=scored.astype(np.float32),
            end_weights=(counts & ~scored).astype(np.float32),
            rows=rows,
            bytes=int(sizes.sum()),
            sizes=sizes,
            marked=marked,
        )
