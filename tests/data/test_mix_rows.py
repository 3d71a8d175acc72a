"""Rows of a mixture against rows that are laid out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data.bpe import BpeTokenizer
from data.corpus import Document
from data.errors import DataError
from data.mix_order import MixedOrder
from data.mix_rows import MixedRows
from data.mix_texts import Mixture
from data.order import reading_place
from data.store import encode_documents
from data.tokenizers import ByteTokenizer
from tests.data.conftest import prose

SEQ_LEN, LOOKAHEAD = 16, 19  # the last row of a round looks beyond it


@pytest.fixture(scope="module")
def texts() -> list[Document]:
    """Nine of one source and four of another."""
    return [Document(str(n), prose(f"mix{n}", 3 + 11 * (n % 7))) for n in range(13)]


MIXTURE = Mixture(("a", "b"), ((0.8, 0.2), (0.1, 0.9)), (9, 4), (1, 1))
ONE_STAGE = Mixture(("a", "b"), ((0.8, 0.2),), (9, 4), (1, 1))


def rows_of(texts, mixture=MIXTURE, tokenizer=None, seq_len=SEQ_LEN, ends=(4000.0,)) -> MixedRows:
    store = encode_documents(texts, tokenizer or ByteTokenizer())
    rows = MixedRows(store, store.tokenizer.eot, seq_len, mixture, LOOKAHEAD, seed=3)
    if len(mixture.shares) > 1:
        rows.stage_ends = ends
    return rows


def by_hand(rows: MixedRows, texts, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens and document ids of the first rows, one by one."""
    order = MixedOrder(rows.store.doc_bytes, rows.mixture, 3)
    order.set_ends(rows.stage_ends)
    tokens, ids, number = [], [], 0
    while len(tokens) < count:
        stream, owner = [], []
        for nth, document in enumerate(order.documents(number)):
            text = [rows.eot, *rows.store.tokenizer.encode(texts[document].text).tolist()]
            stream += text
            owner += [nth] * len(text)
        n_rows = (len(stream) - 1) // rows.seq_len
        last = owner[-1]
        stream += [rows.eot] * (rows.lookahead + rows.seq_len)
        owner += [last + 1 + k for k in range(rows.lookahead + rows.seq_len)]
        for visit in range(n_rows):
            start = int(reading_place(np.array([visit]), n_rows)[0]) * rows.seq_len
            span = slice(start, start + rows.seq_len + rows.lookahead)
            tokens.append(stream[span])
            ids.append([one - owner[start] for one in owner[span]])
        number += 1
    return tokens[:count], ids[:count]


def test_rows_are_those_laid_out_by_hand(texts) -> None:
    """Over several rounds, the end of a stage among them."""
    rows = rows_of(texts)
    tokens, ids = by_hand(rows, texts, 900)
    batch = rows.batch(np.arange(900))
    assert batch.tokens.tolist() == tokens and batch.doc_ids.tolist() == ids
    assert (batch.weights == 1).all() and rows._visits(np.array([899]))[0] > 2
    inside = batch.tokens[:, 1 : SEQ_LEN + 1] != rows.eot
    assert batch.bytes == int(inside.sum())


def test_a_row_is_the_same_in_any_company(texts) -> None:
    """What a resumed run and each of several processes ask for."""
    ids = np.array([0, 31, 255, 256, 640, 641, 899])
    together = rows_of(texts).batch(np.arange(900)).tokens[ids]
    assert (rows_of(texts).batch(ids).tokens == together).all()
    rows = rows_of(texts)
    for row, tokens in reversed(list(zip(ids, together, strict=True))):
        assert (rows.batch(np.array([row])).tokens[0] == tokens).all()


def test_who_goes_on_at_a_row_need_not_go_through_those_before_it(texts, monkeypatch) -> None:
    """Nor does it matter where rows are asked for from before the place, and where their length is another."""
    whole = rows_of(texts)
    wanted = whole.batch(np.arange(900)).tokens
    (number,), _ = whole._visits(np.array([700]))
    place = json.loads(json.dumps(whole.place(700)))
    made, make = [], MixedOrder._make
    monkeypatch.setattr(MixedOrder, "_make", lambda self, number: made.append(number) or make(self, number))
    again = rows_of(texts, ends=(9.0,))
    again.go_on(place)
    made.clear()
    assert (again.batch(np.arange(700, 900)).tokens == wanted[700:]).all()
    assert min(made) == number > 1
    assert (again.batch(np.arange(900)).tokens == wanted).all()
    assert (again.batch(np.arange(800, 900)).tokens == wanted[800:]).all()
    other, fresh = rows_of(texts, seq_len=24, ends=(9.0,)), rows_of(texts, seq_len=24)
    other.go_on(place)
    assert (other.batch(np.arange(720, 800)).tokens == fresh.batch(np.arange(720, 800)).tokens).all()


def test_a_byte_model_and_one_of_tokens_read_the_same_documents(texts) -> None:
    bpe = BpeTokenizer.train(texts, 300)
    both = [rows_of(texts, tokenizer=tokenizer) for tokenizer in (ByteTokenizer(), bpe)]
    for rows in both:
        rows.set_length(0, epochs=5.5)
    assert both[0].stage_ends == both[1].stage_ends == (round(2.75 * both[0].store.total_bytes),)
    for number in range(6):
        documents = [rows.mixed.order.documents(number) for rows in both]
        assert (documents[0] == documents[1]).all()
    assert both[0].rows_per_epoch > 1.5 * both[1].rows_per_epoch


def test_stages_that_are_moved_are_forgotten_where_they_were(texts) -> None:
    """As when a run goes on, whose session has looked at rows already."""
    moved, fresh = rows_of(texts), rows_of(texts, ends=(500.0,))
    before = moved.batch(np.arange(300)).tokens
    moved.stage_ends = (500.0,)
    after = moved.batch(np.arange(300)).tokens
    assert (after == fresh.batch(np.arange(300)).tokens).all() and (after != before).any()


def test_a_run_of_so_many_tokens_reads_so_many_bytes(texts) -> None:
    """Start tokens are among them; of each source as often as its share of the whole run says."""
    rows = rows_of(texts)
    sizes = [sum(len(d.text) for d in part) for part in (texts[:9], texts[9:])]
    rate = 0.45 * (sizes[0] + 9) / sizes[0] + 0.55 * (sizes[1] + 4) / sizes[1]
    rows.set_length(100_000)
    assert rows.stage_ends == (round(50_000 / rate),)
    assert rows.rows_per_epoch == (int(sum(sizes) * rate) - 1) // SEQ_LEN


def test_stages_are_equal_parts_of_the_text_that_a_run_reads(texts) -> None:
    rows = rows_of(texts)
    total = 30_000
    rows.set_length(total * SEQ_LEN)
    rounds, _ = rows._visits(np.arange(total))
    of_second = np.array([rows.mixed.order._starts[number + 1].stage for number in range(rounds[-1] + 1)])[
        rounds
    ]
    assert of_second[0] == 0 and of_second[-1] == 1
    assert np.mean(of_second == 0) == pytest.approx(0.5, abs=0.01)


def test_a_mixture_of_one_stage_does_not_depend_on_how_long_the_run_is(texts) -> None:
    short, long = rows_of(texts, ONE_STAGE), rows_of(texts, ONE_STAGE)
    short.set_length(1000)
    long.set_length(10**9, epochs=100.0)
    assert (short.batch(np.arange(400)).tokens == long.batch(np.arange(400)).tokens).all()


def test_longer_rows_than_the_text_are_refused(texts) -> None:
    with pytest.raises(DataError, match="too short for one row"):
        rows_of(texts, seq_len=5000)
    # What lies in a round may be less than all of the text: in the second stage it is of the shorter words.
    words = [Document("a", b"word " * 20)] * 20 + [Document("b", "\u3042".encode() * 100)] * 7
    pair = Mixture(("a", "b"), ((0.99, 0.01), (0.01, 0.99)), (20, 7), (1, 1))
    tokenizer = BpeTokenizer.train([Document("", "\u3042".encode() * 20_000)], 264)
    with pytest.raises(
        DataError,
        match=r"too short for one row: stage 2 of the mixture has (\d+) tokens.*Nearest: train_seq_len=\d+",
    ) as caught:
        rows_of(words, pair, tokenizer, seq_len=1000)
    nearest = int(str(caught.value).rpartition("=")[2])
    assert rows_of(words, pair, tokenizer, nearest).seq_len == nearest < 200


@pytest.mark.parametrize("position", [0, 1600, 7000, 40_000])
def test_another_length_of_rows_says_what_is_read_twice_and_never(texts, position) -> None:
    before, after = rows_of(texts, seq_len=16), rows_of(texts, seq_len=24)
    round_, visit = (int(found[0]) for found in before._visits(np.array([position // 16])))
    counts = np.zeros(before._length(round_) - 1, dtype=np.int64)
    n_old, n_new = len(counts) // 16, len(counts) // 24
    for place in reading_place(np.arange(visit), n_old):
        counts[place * 16 : place * 16 + 16] += 1
    after._visits(np.array([5000]))
    first = -(-position // 24)
    for number in range(after._rows_before[round_], after._rows_before[round_ + 1]):
        if number >= first:
            place = int(reading_place(np.array([number - after._rows_before[round_]]), n_new)[0])
            counts[place * 24 : place * 24 + 24] += 1
    assert after.changed_length(16, position) == pytest.approx((np.mean(counts > 1), np.mean(counts == 0)))
