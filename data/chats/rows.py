"""Rows that begin where a document does: of chats, of which the answers alone are learned, and of text that is padded
instead of packed.

B rows, S scored positions, n look-ahead, as in `data/rows.py`.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from data.chats.store import ChatStore
from data.chats.template import UNLEARNED
from data.errors import DataError
from data.order import DocumentOrder
from data.rows import Batch, HeldoutRows, TrainingRows
from data.store import TokenStore
from data.tokenizers import spans_of

__all__ = ["HeldoutChats", "WholeRows", "heldout_rows"]

KEPT = 2  # epochs in memory: a step may straddle two


class _Plan(NamedTuple):
    """Rows of an epoch: `order` (n_docs,) its documents; row r holds those from `first[r]` to `behind[r] - 1` of
    them."""

    order: np.ndarray
    first: np.ndarray
    behind: np.ndarray


class WholeRows(TrainingRows):
    """Rows of documents from their starts.

    An epoch is every document once, in the order of `DocumentOrder`. With `packing` whole ones follow each other in a
    row while they fit, each behind a start token of its own and seen by itself alone; else each has its row. A document
    longer than a row is cut on the right. What a row has left is padding: start tokens, each a document of its own,
    that count as nothing. Of chats the targets that count are those of the answers, and a row without one is left out;
    of text they are all its tokens and its end.

    The rows of an epoch are planned at once, from the lengths of its documents. A position is a number of documents
    served, over all epochs; a row's id is that of its first document. As a row begins wherever the one before it ended,
    rows from a position on do not depend on those before, and another seq_len may go on from any position.

    Raises:
        DataError: no row has a target that counts.
    """

    def __init__(
        self,
        store: TokenStore,
        eot: int,
        seq_len: int,
        lookahead: int = 1,
        seed: int = 0,
        packing: bool = True,
    ):
        self.store, self.eot, self.seq_len, self.lookahead = store, eot, seq_len, lookahead
        self.packing = packing
        every = np.arange(store.n_docs)
        self.answers = store.answers if isinstance(store, ChatStore) else None
        whole = store.lengths_of(every) + (self.answers is None)  # the end of a text is a target
        self._targets = np.minimum(whole, seq_len)  # of each document
        self._counting = (
            store.learned_in(every, seq_len)[0] if isinstance(store, ChatStore) else self._targets
        )
        self.cut_documents = int((whole > seq_len).sum())
        self.cut_targets = int((whole - self._targets).sum())
        self._order = DocumentOrder(store.n_docs, seed)
        self._plans: dict[tuple[int, int], _Plan] = {}
        self._lock = threading.RLock()  # a run's loader and its main thread may both ask for rows
        self._begin_at(0)
        if not self._counting.any():
            raise DataError(self._nothing_to_learn())
        plan = self._plan(0)
        self.dropped_rows = self._planned(0, 0) - len(plan.first)
        self.rows_per_epoch = len(plan.first)
        self.tokens_per_epoch = int((self._targets + 1).sum())

    def _nothing_to_learn(self) -> str:
        longest = int(self.store.lengths_of(np.arange(self.store.n_docs)).max(initial=0))
        longer = (
            f"The longest has {longest} tokens: set train_seq_len={longest}, or look"
            if longest > self.seq_len
            else "Look"
        )
        return (
            f"no training chat has a token of an answer among its first {self.seq_len} tokens, so that there is "
            f"nothing to learn. {longer} at the roles of its turns"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the text no row has, in words."""
        what = "text" if self.answers is None else "chat"
        found = []
        if self.cut_documents:
            found.append(
                f"{self.cut_documents:,} of {self.store.n_docs:,} training {what}s are longer than a row of "
                f"{self.seq_len} tokens: {self.cut_targets:,} tokens at their ends are cut off"
            )
        if self.dropped_rows:
            found.append(
                f"{self.dropped_rows:,} rows of an epoch hold no token of an answer and are left out"
            )
        return tuple(found)

    # -- rows by number --------------------------------------------------------------------------------------------

    def batch(self, rows: np.ndarray) -> Batch:
        """The given rows (B,), counted from where the run was last (re)started, in the given order."""
        shape = (len(rows), self.seq_len + self.lookahead)
        tokens = np.full(shape, self.eot, dtype=np.int64)
        doc_ids = np.empty(shape, dtype=np.int32)
        weights = np.zeros((len(rows), self.seq_len), dtype=np.float32)
        ids, total = np.empty(len(rows), dtype=np.int64), 0
        for place, row in enumerate(rows):
            epoch, plan, nth = self._find(int(row))
            ids[place] = epoch * self.store.n_docs + plan.first[nth]
            column = 0
            documents = plan.order[plan.first[nth] : plan.behind[nth]].tolist()
            for number, document in enumerate(documents):
                behind = column + 1 + int(self._targets[document])
                total += self._lay(document, tokens[place, column + 1 : behind], weights[place, column:])
                doc_ids[place, column:behind] = number
                column = behind
            doc_ids[place, column:] = len(documents) + np.arange(shape[1] - column)
        if self.lookahead > 1:  # targets beyond the row are nobody's
            doc_ids[:, self.seq_len :] = self.store.n_docs + np.arange(self.lookahead)
        chats = self.answers is not None
        return Batch(tokens, doc_ids, weights, np.zeros_like(weights), ids, total, chats=chats)

    def _lay(self, document: int, tokens: np.ndarray, weights: np.ndarray) -> int:
        """Put a document into its stretch of a row, `tokens` (targets,), and say in `weights` (targets or more,) which
        count; their bytes."""
        start = int(self.store.offsets[document])
        places = np.arange(start, min(start + len(tokens), int(self.store.offsets[document + 1])))
        ids = np.asarray(self.store.tokens[places])
        tokens[: len(ids)] = ids
        if self.answers is not None:
            answers = self.answers[places]
            weights[: len(ids)] = answers != UNLEARNED
            return int(answers.clip(min=0).sum())
        weights[: len(tokens)] = 1
        spans = spans_of(self.store.tokenizer, ids)
        return int(self.store.raw_sizes(places, spans[:, 1] - spans[:, 0]).sum())

    def _find(self, row: int) -> tuple[int, _Plan, int]:
        """Its epoch, the plan of that, and which of its rows it is."""
        with self._lock:
            while self._before[-1] <= row:
                epoch = self._epoch + len(self._before) - 1
                self._before.append(self._before[-1] + len(self._plan(epoch).first))
            behind = int(np.searchsorted(self._before, row, side="right")) - 1
            return self._epoch + behind, self._plan(self._epoch + behind), row - self._before[behind]

    # -- positions -------------------------------------------------------------------------------------------------

    def position_of(self, row: int) -> int:
        epoch, plan, nth = self._find(row)
        return epoch * self.store.n_docs + int(plan.first[nth])

    def row_at(self, position: int) -> int:
        """Rows are counted anew from there."""
        self._begin_at(position)
        return 0

    def _begin_at(self, position: int) -> None:
        with self._lock:
            self._epoch, self._skipped = divmod(position, max(self.store.n_docs, 1))
            self._before = [0]  # rows before each epoch, from the first on

    def rows_of(self, epochs: float) -> float:
        """Rows of so many epochs from the first on, of which no two have equally many."""
        whole = int(epochs)
        rows = sum(len(self._planned_epoch(epoch, 0).first) for epoch in range(whole))
        rest = epochs - whole
        return rows + (rest * len(self._planned_epoch(whole, 0).first) if rest else 0)

    def change_of_length(self, seq_len: int, position: int) -> str:
        chats = position % self.store.n_docs
        return (
            f"rows of {self.seq_len} tokens instead of {seq_len} are planned from document {chats:,} of this epoch on: "
            f"none is read twice or left out"
        )

    # -- plans -----------------------------------------------------------------------------------------------------

    def _plan(self, epoch: int) -> _Plan:
        return self._planned_epoch(epoch, self._skipped if epoch == self._epoch else 0)

    def _planned_epoch(self, epoch: int, skipped: int) -> _Plan:
        with self._lock:
            if (epoch, skipped) not in self._plans:
                while len(self._plans) >= KEPT:
                    self._plans.pop(next(iter(self._plans)))
                order = self._order.permutation(epoch)
                first, behind = self._packed(order, skipped)
                counting = np.concatenate([[0], np.cumsum(self._counting[order])])
                keep = counting[behind] > counting[first]
                self._plans[epoch, skipped] = _Plan(order, first[keep], behind[keep])
            return self._plans[epoch, skipped]

    def _planned(self, epoch: int, skipped: int) -> int:
        """Rows of an epoch with those that have nothing to learn."""
        return len(self._packed(self._order.permutation(epoch), skipped)[0])

    def _packed(self, order: np.ndarray, skipped: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each row begins and ends among the documents in this order, without the first `skipped`."""
        if not self.packing:
            first = np.arange(skipped, len(order))
            return first, first + 1
        ends = np.cumsum(self._targets[order] + 1)  # columns up to the end of each
        bounds, at = [skipped], skipped
        while at < len(order):
            before = int(ends[at - 1]) if at else 0
            at = int(np.searchsorted(ends, before + self.seq_len + 1, side="right"))
            bounds.append(at)
        found = np.array(bounds, dtype=np.int64)
        return found[:-1], found[1:]


class HeldoutChats(HeldoutRows):
    """Held-out chats, each in one row from its start token, cut on the right where it is longer. Tokens of answers are
    scored, and those that end them: `total_bytes` are those of the answers."""

    scores = "answers"
    store: ChatStore

    def _windows(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Without the end of the document: the chat has its own."""
        own = np.minimum(targets - 1, self.seq_len)
        every = np.arange(len(own))
        self.cut_documents = int((targets - 1 > self.seq_len).sum())
        return every, np.zeros_like(every), own

    def _count_bytes(self) -> int:
        learned, bytes_ = self.store.learned_in(self._document, self.seq_len)
        if not (learned.any() and bytes_.any()):
            raise DataError(
                f"no held-out chat has an answer with text among its first {self.seq_len} tokens, so that there is "
                f"nothing to score. Set a longer val_seq_len, or look at the roles of its turns"
            )
        self.complete = self.complete and not self.cut_documents
        return int(bytes_.sum())

    def batch(self, rows: np.ndarray) -> Batch:
        found = super().batch(rows)
        rows = np.asarray(rows, dtype=np.int64)
        width = found.weights.shape[1]
        document = self._document[rows]
        index = self.store.offsets[document][:, None] + np.arange(width)  # (B, width): of each target
        inside = found.weights > 0
        answers = np.full(inside.shape, UNLEARNED, dtype=np.int64)
        answers[inside] = self.store.answers[index[inside]]
        learned = answers != UNLEARNED
        sizes = np.where(learned, answers, 0)
        return Batch(
            tokens=found.tokens,
            doc_ids=found.doc_ids,
            weights=learned.astype(np.float32),
            end_weights=np.zeros_like(found.end_weights),
            rows=found.rows,
            bytes=int(sizes.sum()),
            sizes=sizes,
            chats=True,
        )


def heldout_rows(store: TokenStore, *given: Any, **more: Any) -> HeldoutRows:
    """`HeldoutRows` of text, `HeldoutChats` of chats."""
    return (HeldoutChats if isinstance(store, ChatStore) else HeldoutRows)(store, *given, **more)
