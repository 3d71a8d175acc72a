"""Training rows of a mixture: those of `TrainingRows`, whose epochs are the rounds of `MixedOrder`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.errors import DataError
from data.mix_order import MixedOrder
from data.mix_texts import Mixture
from data.places import Pieces, spread
from data.rows import Batch, TrainingRows, read_again
from data.store import TokenStore

__all__ = ["MixedRows"]

KEPT = 2  # rounds in memory: a step may straddle two


class MixedPlaces:
    """Documents by position in the stream of a round: what `StreamPlaces` is of an epoch."""

    def __init__(self, store: TokenStore, mixture: Mixture, seed: int):
        self._offsets, self._mixture = store.offsets, mixture
        self.order = MixedOrder(store.doc_bytes, mixture, seed)
        self.stage_rates = self._stage_rates(store)
        self.tokens_per_byte = sum(self.stage_rates) / len(self.stage_rates)
        self.tokens_per_epoch = int(store.total_bytes * self.tokens_per_byte)
        self._rounds: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _stage_rates(self, store: TokenStore) -> list[float]:
        """Tokens per byte in each stage, start tokens included."""
        ends, rates = np.cumsum([0, *self._mixture.train]), []
        for first, behind in itertools.pairwise(ends.tolist()):
            tokens = int(store.offsets[behind] - store.offsets[first]) + behind - first
            rates.append(tokens / max(int(store.doc_bytes[first:behind].sum()), 1))
        return [
            sum(share * rate for share, rate in zip(stage, rates, strict=True))
            for stage in self._mixture.shares
        ]

    def set_ends(self, ends: Sequence[float]) -> None:
        """Bytes after which each stage but the last ends."""
        self.order.set_ends(ends)
        self._rounds = {}

    def length(self, number: int) -> int:
        """Tokens of a round, start tokens included."""
        return int(self._round(number)[1][-1])

    def pieces(self, epoch: int, begins: np.ndarray, width: int) -> Pieces:
        documents, bounds = self._round(epoch)
        ends = np.minimum(begins + width, bounds[-1])
        first = np.searchsorted(bounds, begins, side="right") - 1
        last = np.searchsorted(bounds, ends, side="left") - 1
        row, nth = spread(last - first + 1)
        turn = first[row] + nth
        return Pieces(row, bounds[turn] - begins[row], documents[turn])

    def _round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Its documents (k,), and the positions of their start tokens and of its end (k + 1,)."""
        if number not in self._rounds:
            documents = self.order.documents(number)
            bounds = np.zeros(len(documents) + 1, dtype=np.int64)
            np.cumsum(self._offsets[documents + 1] - self._offsets[documents] + 1, out=bounds[1:])
            while len(self._rounds) >= KEPT:
                self._rounds.pop(next(iter(self._rounds)))
            self._rounds[number] = documents, bounds
        return self._rounds[number]


class MixedRows(TrainingRows):
    """Rows of seq_len targets over the endless stream of rounds.

    A round is read as an epoch is: every document behind its start token, at `READERS` places in turn, without the
    targets of its last partial row; those of the rounds are numbered one behind the other. `rows_per_epoch`, by which
    `num_epochs` counts, is that of reading as many bytes as all the training text has.

    Stages end after equal parts of the bytes that the run reads (`set_length`).

    Raises:
        DataError: the text is too short for one row.
    """

    def __init__(
        self,
        store: TokenStore,
        eot: int,
        seq_len: int,
        mixture: Mixture,
        lookahead: int = 1,
        seed: int = 0,
    ):
        self.mixture, self.seed = mixture, seed
        super().__init__(store, eot, seq_len, lookahead, seed)
        self._lock = threading.Lock()  # a run's loader and its main thread may both ask for rows
        self._begin_anew()
        for stage, rate in enumerate(self.mixed.stage_rates):
            if (tokens := int(self.mixed.order.round_bytes * rate)) <= seq_len:
                raise self._too_short(f"stage {stage + 1}", tokens)

    def _too_short(self, what: str, tokens: int) -> DataError:
        return DataError(
            f"the training text is too short for one row: {what} of the mixture has {tokens} tokens of "
            f"{self.mixed.order.round_bytes:,} bytes (start tokens included), and train_seq_len {self.seq_len} needs "
            f"{self.seq_len + 1}. Nearest: train_seq_len={max(tokens - 1, 1)}"
        )

    def _places_of(self, store: TokenStore, seed: int) -> MixedPlaces:
        self.mixed = MixedPlaces(store, self.mixture, seed)
        return self.mixed

    def _begin_anew(self, number: int = 0, row: int = 0) -> None:
        """Know no rounds but that the one of this number begins with this row."""
        self._first = number
        self._rows_before, self._lengths = [row], list[int]()  # of each round from there on

    def batch(self, rows: np.ndarray) -> Batch:
        with self._lock:
            return super().batch(rows)

    # -- stages ----------------------------------------------------------------------------------------------------

    @property
    def stage_ends(self) -> tuple[float, ...]:
        """Bytes after which each stage but the last ends."""
        return self.mixed.order.ends

    @stage_ends.setter
    def stage_ends(self, ends: Sequence[float]) -> None:
        if tuple(ends) != self.stage_ends:  # rounds that are known already stay so
            self.mixed.set_ends(ends)
            self._begin_anew()

    def set_length(self, targets: int, epochs: float | None = None) -> None:
        """Lay the stages over a run of so many targets. Passes over the text are a number of bytes, the same for every
        tokenizer; targets are so many bytes as they have on average."""
        size = targets / self.mixed.tokens_per_byte if epochs is None else epochs * self.store.total_bytes
        stages = len(self.mixture.shares)
        self.stage_ends = [float(round(size * stage / stages)) for stage in range(1, stages)]

    def place(self, row: int) -> dict[str, Any]:
        """How to go on at a row, as JSON: where stages end, and where the row's round begins."""
        with self._lock:
            (number,), (visit,) = self._visits(np.array([row]))
            start = self.mixed.order.start(int(number))
        before = {"round": int(number), "row": row - int(visit), "seq_len": self.seq_len, **start}
        return {"stage_ends": list(self.stage_ends), "from": before}

    def go_on(self, place: Mapping[str, Any]) -> None:
        """Take from the `place` of a run on this text where stages end and, unless rows have another length by now,
        where to begin: what was read before need not be gone through."""
        self.stage_ends = tuple(place["stage_ends"])
        before = place["from"]
        if before["seq_len"] == self.seq_len:
            self.mixed.order.begin_at(before["round"], before)
            self._begin_anew(before["round"], before["row"])

    # -- rounds ----------------------------------------------------------------------------------------------------

    def _visits(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if rows.min(initial=self._rows_before[0]) < self._rows_before[0]:
            self._begin_anew()
        while self._rows_before[-1] <= rows.max(initial=0):
            number = self._first + len(self._lengths)
            length = self.mixed.length(number)
            n_rows = (length - 1) // self.seq_len
            if not n_rows and not self.mixed.order.is_cut_short(number):
                raise self._too_short(f"round {number + 1}", length)
            self._lengths.append(length)
            self._rows_before.append(self._rows_before[-1] + n_rows)
        before = np.array(self._rows_before, dtype=np.int64)
        found = np.searchsorted(before, rows, side="right") - 1
        return self._first + found, rows - before[found]

    def _length(self, epoch: int) -> int:
        return self._lengths[epoch - self._first]

    def changed_length(self, seq_len: int, position: int) -> tuple[float, float]:
        """As of one text, of the round that is being read."""
        before = MixedRows(self.store, self.eot, seq_len, self.mixture, self.lookahead, self.seed)
        before.stage_ends = self.stage_ends
        (number,), (visits,) = before._visits(np.array([position // seq_len]))
        (there,), (begins,) = self._visits(np.array([-(-position // self.seq_len)]))
        length = before._length(int(number))
        begins = begins if there == number else 0 if there < number else length
        return read_again(length - 1, (seq_len, int(visits)), (self.seq_len, int(begins)))
