"""Training rows of a mixture: those of `TrainingRows`, whose epochs are the rounds of `MixedOrder`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

import numpy as np

from data.errors import DataError
from data.mix_order import MixedOrder
from data.mix_texts import Mixture
from data.rows import Batch, TrainingRows, read_again
from data.store import TokenStore

__all__ = ["MixedRows"]

KEPT = 2  # rounds in memory: a step may straddle two


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
        super().__init__(store, eot, seq_len, lookahead, seed)
        self.mixture = mixture
        self.mixed = MixedOrder(store.doc_bytes, mixture, seed)
        self.stage_rates = self._stage_rates(store)
        self.tokens_per_byte = sum(self.stage_rates) / len(self.stage_rates)
        self.tokens_per_epoch = int(store.total_bytes * self.tokens_per_byte)
        self.rows_per_epoch = max(1, (self.tokens_per_epoch - 1) // seq_len)
        self._lock = threading.Lock()  # a run's loader and its main thread may both ask for rows
        self._begin_anew()
        for stage, rate in enumerate(self.stage_rates):
            if (tokens := int(self.mixed.round_bytes * rate)) <= seq_len:
                raise self._too_short(f"stage {stage + 1}", tokens)

    def _too_short(self, what: str, tokens: int) -> DataError:
        return DataError(
            f"the training text is too short for one row: {what} of the mixture has {tokens} tokens of "
            f"{self.mixed.round_bytes:,} bytes (start tokens included), and train_seq_len {self.seq_len} needs "
            f"{self.seq_len + 1}. Nearest: train_seq_len={max(tokens - 1, 1)}"
        )

    def batch(self, rows: np.ndarray) -> Batch:
        with self._lock:
            return super().batch(rows)

    def _begin_anew(self) -> None:
        self._rows_before, self._lengths = [0], list[int]()  # of each round that is known
        self._rounds: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _stage_rates(self, store: TokenStore) -> list[float]:
        """Tokens per byte in each stage, start tokens included."""
        ends, rates = np.cumsum([0, *self.mixture.train]), []
        for first, behind in itertools.pairwise(ends.tolist()):
            tokens = int(store.offsets[behind] - store.offsets[first]) + behind - first
            rates.append(tokens / max(int(store.doc_bytes[first:behind].sum()), 1))
        return [
            sum(share * rate for share, rate in zip(stage, rates, strict=True))
            for stage in self.mixture.shares
        ]

    # -- stages ----------------------------------------------------------------------------------------------------

    @property
    def stage_ends(self) -> tuple[float, ...]:
        """Bytes after which each stage but the last ends."""
        return self.mixed.ends

    @stage_ends.setter
    def stage_ends(self, ends: Sequence[float]) -> None:
        if tuple(ends) != self.mixed.ends:  # rounds that are known already stay so
            self.mixed.set_ends(ends)
            self._begin_anew()

    def set_length(self, targets: int, epochs: float | None = None) -> None:
        """Lay the stages over a run of so many targets. Passes over the text are a number of bytes, the same for every
        tokenizer; targets are so many bytes as they have on average."""
        size = targets / self.tokens_per_byte if epochs is None else epochs * self.store.total_bytes
        stages = len(self.mixture.shares)
        self.stage_ends = [float(round(size * stage / stages)) for stage in range(1, stages)]

    # -- rounds ----------------------------------------------------------------------------------------------------

    def _visits(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        while self._rows_before[-1] <= rows.max(initial=0):
            number = len(self._lengths)
            _, starts = self._epoch(number)
            n_rows = (self._lengths[number] - 1) // self.seq_len
            if not n_rows and not self.mixed.is_cut_short(number):
                raise self._too_short(f"round {number + 1}", self._lengths[number])
            self._rows_before.append(self._rows_before[-1] + n_rows)
        before = np.array(self._rows_before, dtype=np.int64)
        rounds = np.searchsorted(before, rows, side="right") - 1
        return rounds, rows - before[rounds]

    def _length(self, epoch: int) -> int:
        return self._lengths[epoch]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents (k,) of a round, and the stream position of each one's start token (k,)."""
        found = self._rounds.get(epoch)
        if found is None:
            documents = self.mixed.documents(epoch)
            lengths = (
                np.asarray(self.store.offsets)[documents + 1] - np.asarray(self.store.offsets)[documents] + 1
            )
            ends = np.cumsum(lengths)
            if epoch == len(self._lengths):
                self._lengths.append(int(ends[-1]))
            found = documents, ends - lengths
            while len(self._rounds) >= KEPT:
                self._rounds.pop(next(iter(self._rounds)))
            self._rounds[epoch] = found
        return found

    def changed_length(self, seq_len: int, position: int) -> tuple[float, float]:
        """As of one text, of the round that is being read."""
        before = MixedRows(self.store, self.eot, seq_len, self.mixture, self.lookahead, self.order.seed)
        before.stage_ends = self.stage_ends
        (number,), (visits,) = before._visits(np.array([position // seq_len]))
        (there,), (begins,) = self._visits(np.array([-(-position // self.seq_len)]))
        length = before._length(int(number))
        begins = begins if there == number else 0 if there < number else length
        return read_again(length - 1, (seq_len, int(visits)), (self.seq_len, int(begins)))
