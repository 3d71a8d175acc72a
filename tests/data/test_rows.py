"""Rows are functions of their number: every token a target once, every held-out byte scored once."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import order, places
from data.corpus import Document
from data.errors import DataError
from data.order import READERS, DocumentOrder, reading_place
from data.rows import Batch, HeldoutRows, TrainingRows, select_heldout
from data.store import TokenStore, encode_documents
from data.tokenizers import ByteTokenizer

texts = st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=8)


def store_of(raw: list[bytes]) -> TokenStore:
    return encode_documents([Document(str(n), text) for n, text in enumerate(raw)], ByteTokenizer())


def plain_stream(store: TokenStore, eot: int, seed: int, epoch: int) -> list[int]:
    """An epoch's stream restated with lists."""
    stream: list[int] = []
    for document in DocumentOrder(store.n_docs, seed).permutation(epoch):
        stream += [eot, *store.tokens[store.offsets[document] : store.offsets[document + 1]].tolist()]
    return stream


@given(n_docs=st.integers(0, 200), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 10**9))
def test_order_is_a_permutation(n_docs: int, seed: int, epoch: int) -> None:
    permutation = DocumentOrder(n_docs, seed).permutation(epoch)
    assert sorted(permutation.tolist()) == list(range(n_docs))
    assert (permutation == DocumentOrder(n_docs, seed).permutation(epoch)).all()


def test_order_changes_with_seed_and_epoch_and_is_pinned() -> None:
    order = DocumentOrder(50, 1337)
    assert (order.permutation(0) != order.permutation(1)).any()
    assert (order.permutation(0) != DocumentOrder(50, 1338).permutation(0)).any()
    # Golden: a resumed run must find this order on every platform and numpy.
    assert DocumentOrder(10, 1337).permutation(3).tolist() == [9, 7, 3, 4, 0, 1, 8, 2, 6, 5]


def test_order_has_no_favourite_place() -> None:
    first = np.array([DocumentOrder(8, seed).permutation(0)[0] for seed in range(4000)])
    counts = np.bincount(first, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 30  # chi-square, 7 degrees of freedom: p = 1e-4


@given(
    raw=texts,
    seq_len=st.integers(1, 20),
    lookahead=st.integers(1, 4),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    block=st.sampled_from([1, 2, 3, 65_536]),
)
@settings(deadline=None)
def test_training_rows_restate_the_stream(raw, seq_len, lookahead, seed, epoch, block) -> None:
    """Also of a text so large that its order has two levels, of which few blocks are held at a time."""
    with (
        patch.multiple(order, BLOCK=block, ONE_LEVEL=0 if block < 9 else 99),
        patch.object(places, "READERS", 1),
    ):
        restated(raw, seq_len, lookahead, seed, epoch)


def restated(raw: list[bytes], seq_len: int, lookahead: int, seed: int, epoch: int) -> None:
    store = store_of(raw)
    stream = plain_stream(store, 256, seed, epoch)
    if len(stream) - 1 < seq_len:
        with pytest.raises(DataError, match=f"largest train_seq_len for it is {len(stream) - 1}"):
            TrainingRows(store, 256, seq_len, lookahead, seed)
        return
    rows = TrainingRows(store, 256, seq_len, lookahead, seed)
    assert rows.rows_per_epoch == (len(stream) - 1) // seq_len
    batch = in_stream_order(rows, epoch)
    padded = stream + [256] * lookahead
    for number, (tokens, doc_ids) in enumerate(zip(batch.tokens, batch.doc_ids, strict=True)):
        begin = number * seq_len
        assert tokens.tolist() == padded[begin : begin + seq_len + lookahead]
        assert doc_ids[0] == 0
        assert (np.diff(doc_ids) == (tokens[1:] == 256)).all()  # a start token begins a document
    targets = batch.tokens[:, 1 : seq_len + 1].reshape(-1).tolist()
    assert (
        targets == stream[1 : len(targets) + 1]
    )  # each once, in order; only the last partial row is dropped
    assert len(stream) - 1 - len(targets) < seq_len
    assert batch.bytes == sum(token != 256 for token in targets)
    assert batch.weights.all() and not batch.end_weights.any()
    assert batch.weights.shape == batch.end_weights.shape == (rows.rows_per_epoch, seq_len)
    assert (batch.tokens.dtype, batch.doc_ids.dtype, batch.weights.dtype) == (np.int64, np.int32, np.float32)


def in_stream_order(rows: TrainingRows, epoch: int = 0) -> Batch:
    """All rows of an epoch, put back into the order of the stream."""
    visits = np.arange(rows.rows_per_epoch)
    place = reading_place(visits, rows.rows_per_epoch)
    assert sorted(place.tolist()) == visits.tolist(), "every row is read exactly once"
    return rows.batch(epoch * rows.rows_per_epoch + np.argsort(place))


@pytest.mark.parametrize("n_rows", [1, 2, 255, 256, 257, 511, 1000, 16_403])
def test_the_stream_is_read_at_many_places_in_step(n_rows: int) -> None:
    place = reading_place(np.arange(n_rows), n_rows)
    assert sorted(place.tolist()) == list(range(n_rows))
    readers = min(READERS, n_rows)
    if n_rows >= 2 * readers:
        # Neighbours of a step lie far apart, and each reader goes on where it stopped.
        assert np.diff(place[:readers]).min() >= n_rows // readers
        assert (place[readers : 2 * readers] == place[:readers] + 1).all()


@given(ids=st.lists(st.integers(0, 400), min_size=1, max_size=10))
@settings(deadline=None)
def test_a_row_does_not_depend_on_its_batch(byte_store: TokenStore, ids: list[int]) -> None:
    """Also with steps that straddle epochs, in any order, with repeats."""
    rows = TrainingRows(byte_store, 256, 100, 2, seed=7)
    assert max(ids) >= 0 and rows.rows_per_epoch < 400
    together = rows.batch(np.array(ids))
    for place, row in enumerate(ids):
        alone = TrainingRows(byte_store, 256, 100, 2, seed=7).batch(np.array([row]))
        assert (together.tokens[place] == alone.tokens[0]).all()
        assert (together.doc_ids[place] == alone.doc_ids[0]).all()
        assert together.rows[place] == row


def test_rows_of_later_epochs_are_shuffled_anew(byte_store: TokenStore) -> None:
    rows = TrainingRows(byte_store, 256, 64, seed=1)
    first = rows.batch(np.arange(rows.rows_per_epoch)).tokens
    second = rows.batch(np.arange(rows.rows_per_epoch) + rows.rows_per_epoch).tokens
    assert (first != second).any()


def test_a_row_far_away_costs_no_walk(byte_store: TokenStore) -> None:
    rows = TrainingRows(byte_store, 256, 64, seed=1)
    far = np.array([10**12, 5, 10**12 + 1, 2 * 10**12])
    assert rows.batch(far).tokens.shape == (4, 65)
    assert len(rows._places._epochs) <= 2 and len(rows._places._held) <= 2  # nothing accumulates on the way


def test_tokenizers_see_the_same_documents_in_the_same_order(byte_store, bpe_store) -> None:
    def order_of_texts(store: TokenStore) -> bytes:
        rows = TrainingRows(store, store.tokenizer.eot, 16, seed=3)
        batch = in_stream_order(rows)
        stream = [int(batch.tokens[0, 0]), *batch.tokens[:, 1:17].reshape(-1).tolist()]
        return b"".join(
            b"|" if token == store.tokenizer.eot else store.tokenizer.decode([token]) for token in stream
        )

    by_bytes, by_bpe = order_of_texts(byte_store), order_of_texts(bpe_store)
    length = min(len(by_bytes), len(by_bpe))  # they drop different last partial rows
    assert length > byte_store.total_bytes * 0.9
    assert by_bytes[:length] == by_bpe[:length]


@given(raw=texts, seq_len=st.integers(1, 20), lookahead=st.integers(1, 3), size=st.integers(1, 5))
@settings(deadline=None)
def test_every_held_out_byte_is_scored_once(raw, seq_len, lookahead, size) -> None:
    store = store_of(raw)
    rows = HeldoutRows(store, 256, seq_len, lookahead=lookahead)
    scored: dict[int, list[int]] = {}
    ends = counted = 0
    for begin in range(0, rows.n_rows, size):
        batch = rows.batch(np.arange(begin, min(begin + size, rows.n_rows)))
        width = batch.weights.shape[1]
        assert batch.tokens.shape == batch.doc_ids.shape == (len(batch.rows), width + lookahead)
        assert (batch.weights.any(axis=0) | batch.end_weights.any(axis=0)).all()  # trimmed to the longest row
        targets = batch.tokens[:, 1 : width + 1]
        assert not ((batch.weights > 0) & (batch.end_weights > 0)).any()
        assert (targets[batch.end_weights > 0] == 256).all()
        inside = (batch.weights > 0) & (batch.doc_ids[:, 1 : width + 1] == 0)
        assert (inside == (batch.weights > 0)).all()
        for row, chosen, line in zip(batch.rows, batch.weights > 0, targets, strict=True):
            scored[int(row)] = line[chosen].tolist()
        ends += int(batch.end_weights.sum())
        counted += batch.bytes
    in_order = sorted(
        scored, key=lambda row: (list(rows.documents).index(rows._document[row]), rows._first[row])
    )
    text = b"".join(store.tokenizer.decode(scored[row]) for row in in_order)
    assert text == b"".join(store.text(document) for document in rows.documents)
    assert counted == rows.total_bytes == store.total_bytes
    assert ends == store.n_docs and rows.complete
    lengths = [len(scored[row]) for row in range(rows.n_rows)]
    assert (np.diff(rows._length) <= 0).all() and sum(lengths) + ends == rows.n_targets


def test_windows_begin_with_the_token_before(bpe_store: TokenStore) -> None:
    eot = bpe_store.tokenizer.eot
    rows = HeldoutRows(bpe_store, eot, 50)
    batch = rows.batch(np.arange(rows.n_rows))
    for row in range(rows.n_rows):
        document, first = rows._document[row], rows._first[row]
        expected = eot if first == 0 else bpe_store.tokens[bpe_store.offsets[document] + first - 1]
        assert batch.tokens[row, 0] == expected
    assert batch.bytes == bpe_store.total_bytes


def test_padding_rows_count_nothing(byte_store: TokenStore) -> None:
    rows = HeldoutRows(byte_store, 256, 40)
    real, padded = rows.batch(np.array([3, 0])), rows.batch(np.array([3, -1, 0]))
    assert not padded.weights[1].any() and not padded.end_weights[1].any()
    assert padded.bytes == real.bytes and padded.weights.sum() == real.weights.sum()
    assert (padded.tokens[[0, 2]] == real.tokens).all()
    assert rows.batch(np.array([-1])).weights.sum() == 0


def test_val_bytes_takes_whole_documents_in_a_fixed_order(byte_store, bpe_store) -> None:
    every = select_heldout(byte_store)
    for limit in (1, 500, 2000, byte_store.total_bytes - 1, byte_store.total_bytes):
        chosen = select_heldout(byte_store, limit)
        assert chosen.tolist() == every[: len(chosen)].tolist() == select_heldout(bpe_store, limit).tolist()
        size = int(byte_store.doc_bytes[chosen].sum())
        assert size <= limit or len(chosen) == 1
        if len(chosen) < len(every):
            assert size + int(byte_store.doc_bytes[every[len(chosen)]]) > limit  # the next would not fit
        rows = HeldoutRows(byte_store, 256, 64, max_bytes=limit)
        assert rows.total_bytes == size and rows.complete
        assert rows.batch(np.arange(rows.n_rows)).bytes == size


def test_val_tokens_cuts_and_says_so(bpe_store: TokenStore) -> None:
    eot = bpe_store.tokenizer.eot
    every = HeldoutRows(bpe_store, eot, 64)
    cut = HeldoutRows(bpe_store, eot, 64, max_tokens=every.n_targets // 2)
    assert not cut.complete and cut.n_targets <= every.n_targets // 2 < every.n_targets
    assert cut.total_bytes == cut.batch(np.arange(cut.n_rows)).bytes < every.total_bytes
    assert HeldoutRows(bpe_store, eot, 64, max_tokens=every.n_targets).complete
    assert HeldoutRows(bpe_store, eot, 64, max_tokens=1).n_rows == 1


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4), (3, 5), (4, 3)])
def test_what_another_row_length_reads_twice_and_never(old, new, part, epoch) -> None:
    """Counted target by target, over all rows before the change and all after it."""
    store = store_of([b"x" * 4000])
    before, after = (TrainingRows(store, 256, length) for length in (old, new))
    first = epoch * before.rows_per_epoch + int(part * before.rows_per_epoch)
    counts = np.zeros(after.tokens_per_epoch - 1, dtype=np.int64)
    end = (epoch + 1) * after.rows_per_epoch
    begin = -(-first * old // new)
    for rows, ids in ((before, np.arange(first)), (after, np.arange(begin, end))):
        here = ids[ids // rows.rows_per_epoch == epoch] % rows.rows_per_epoch
        places = reading_place(here, rows.rows_per_epoch)[:, None] * rows.seq_len + np.arange(rows.seq_len)
        counts += np.bincount(places.ravel(), minlength=len(counts))
    twice, never = after.changed_length(old, first * old)
    assert twice == pytest.approx((counts == 2).mean()) and never == pytest.approx((counts == 0).mean())
    assert (twice > 0.01) == (part >= 0.1)


def test_rows_of_the_same_length_are_read_on_from_anywhere() -> None:
    rows = TrainingRows(store_of([b"x" * 4000]), 256, 4)
    dropped = 4000 % 4 / 4000
    assert all(rows.changed_length(4, 4 * n) == pytest.approx((0, dropped)) for n in (0, 7, 500, 999))
