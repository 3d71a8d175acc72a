"""Rows of chats: what they hold, by hand and as a whole; where a run goes on; and rows of text that are padded."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data import load_dataset
from data.chats.messages import Message, document_of
from data.chats.rows import HeldoutChats, WholeRows, heldout_rows
from data.chats.store import ChatStore, encode_chats, load_chats, write_chats
from data.chats.template import UNLEARNED, ChatTemplate
from data.corpus import Document
from data.errors import DataError
from data.order import DocumentOrder
from data.rows import HeldoutRows
from data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
EOT = TOKENIZER.eot


def store_of(*chats: list[int]) -> ChatStore:
    """Of chats given as `Encoded.answers`; ids are the number of the chat."""
    lengths = [len(chat) for chat in chats]
    return ChatStore(
        np.repeat(np.arange(len(chats)), lengths).astype(np.uint16),
        np.cumsum([0, *lengths]),
        np.array([sum(max(a, 0) for a in chat) for chat in chats]),
        TOKENIZER,
        answers=np.concatenate([np.array(chat, dtype=np.int32) for chat in chats]),
    )


def in_order(rows: WholeRows) -> WholeRows:
    """Documents as they stand."""
    rows._order.permutation = lambda epoch: np.arange(rows.store.n_docs)
    rows._plans.clear()
    return rows


CHATS = store_of([-1, -1, 1, 0], [-1, 2, 0], [-1] * 9 + [1, 0], [-1, 1, 0])


def test_rows_by_hand() -> None:
    """Rows of 8 targets: the first two chats take 5 and 4 columns, the third is cut and has nothing left to learn."""
    rows = in_order(WholeRows(CHATS, EOT, 8))
    batch = rows.batch(np.arange(2))
    pad = EOT
    assert batch.tokens.tolist() == [
        [EOT, 0, 0, 0, 0, EOT, 1, 1, 1],
        [EOT, 3, 3, 3, pad, pad, pad, pad, pad],
    ]
    assert batch.doc_ids.tolist() == [[0] * 5 + [1] * 4, [0] * 4 + [1, 2, 3, 4, 5]]
    assert batch.weights.tolist() == [[0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.rows.tolist() == [0, 3] and batch.bytes == 1 + 2 + 1 and batch.chats
    assert rows._plan(0).first.tolist() == [0, 3]


def test_what_is_cut_and_left_out_is_counted() -> None:
    rows = WholeRows(CHATS, EOT, 8, packing=False)
    assert (rows.cut_documents, rows.cut_targets, rows.dropped_rows, rows.rows_per_epoch) == (1, 3, 1, 3)
    assert [note.split(" ")[0] for note in rows.notes] == ["1", "1"]
    assert WholeRows(CHATS, EOT, 11).notes == ()


def test_a_cut_chat_keeps_what_fits() -> None:
    batch = in_order(WholeRows(store_of([-1, 1, 1, 1, 0]), EOT, 3)).batch(np.zeros(1, dtype=np.int64))
    assert batch.tokens.tolist() == [[EOT, 0, 0, 0]] and batch.weights.tolist() == [[0, 1, 1]]
    assert batch.bytes == 2


def test_nothing_to_learn_is_an_error_that_names_a_length() -> None:
    with pytest.raises(DataError, match="no training chat .* first 4 tokens.* train_seq_len=11"):
        WholeRows(store_of([-1] * 10 + [1]), EOT, 4)


def many(number: int = 60, seed: int = 0) -> ChatStore:
    draw = np.random.default_rng(seed)
    return store_of(
        *([*[-1] * int(draw.integers(1, 9)), *[1] * int(draw.integers(1, 9)), 0] for _ in range(number))
    )


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_has_every_chat_once_from_its_start(packing) -> None:
    store = many()
    rows = WholeRows(store, EOT, 40, seed=3, packing=packing)
    for epoch in range(2):
        first = sum(len(rows._plan(e).first) for e in range(epoch))
        batch = rows.batch(first + np.arange(len(rows._plan(epoch).first)))
        seen = []
        for tokens, weights, documents in zip(batch.tokens, batch.weights, batch.doc_ids, strict=True):
            for number in np.unique(documents):
                text = tokens[documents == number][1:]
                if not len(text):
                    continue  # padding
                (chat,) = np.unique(text)
                start = int(np.flatnonzero(documents == number)[0])
                here = store.answers[store.offsets[chat] : store.offsets[chat + 1]]
                assert len(text) == len(here), "a whole chat"
                assert np.array_equal(weights[start : start + len(text)] > 0, here != UNLEARNED)
                seen.append(int(chat))
            learned = np.flatnonzero(weights)
            assert (documents[learned] == documents[learned + 1]).all(), "no target without its chat"
        assert seen == DocumentOrder(60, 3).permutation(epoch).tolist()
    assert batch.weights.sum() == (store.answers != UNLEARNED).sum()


def test_rows_depend_on_seed_epoch_and_length_alone() -> None:
    store = many()
    one, other = WholeRows(store, EOT, 30, seed=1), WholeRows(store, EOT, 30, seed=1)
    every = np.arange(2 * one.rows_per_epoch)
    whole = one.batch(every)
    for row in every[::-1]:
        assert np.array_equal(other.batch(row[None]).tokens[0], whole.tokens[row])
    assert not np.array_equal(WholeRows(store, EOT, 30, seed=2).batch(every).tokens, whole.tokens)


@pytest.mark.parametrize("at", [0, 1, 5, 11, 17])
def test_a_position_is_where_a_run_goes_on(at) -> None:
    store = many()
    rows, again = WholeRows(store, EOT, 30), WholeRows(store, EOT, 30)
    first = again.row_at(rows.position_of(at))
    before, behind = rows.batch(at + np.arange(20)), again.batch(first + np.arange(20))
    assert np.array_equal(before.tokens, behind.tokens) and np.array_equal(before.rows, behind.rows)
    assert again.position_of(first + 7) == rows.position_of(at + 7)


def test_at_another_length_no_chat_is_read_twice_or_left_out() -> None:
    store = many()
    rows, longer = WholeRows(store, EOT, 30), WholeRows(store, EOT, 47)
    position = rows.position_of(9)
    first = longer.row_at(position)
    left = longer.batch(first + np.arange(len(longer._plan(0).first)))
    said = [t for t in left.tokens[left.tokens != EOT].tolist()]
    expected = DocumentOrder(60, 0).permutation(0)[position:].tolist()
    assert list(dict.fromkeys(said)) == expected
    assert f"from document {position} of this epoch on" in longer.change_of_length(30, position)


def test_epochs_have_their_own_numbers_of_rows() -> None:
    rows = WholeRows(many(), EOT, 30)
    counts = [len(rows._planned_epoch(epoch, 0).first) for epoch in range(6)]
    assert len(set(counts)) > 1
    assert rows.rows_of(6) == sum(counts) and rows.rows_of(1.5) == counts[0] + counts[1] / 2


def test_targets_beyond_a_row_are_nobodys() -> None:
    rows = in_order(WholeRows(store_of([-1, 1, 1, 1, 1, 0]), EOT, 4, lookahead=3))
    batch = rows.batch(np.zeros(1, dtype=np.int64))
    assert batch.tokens.tolist() == [[EOT, 0, 0, 0, 0, EOT, EOT]]
    assert len(set(batch.doc_ids[0, 4:].tolist()) | {0}) == 4


# -- held out ----------------------------------------------------------------------------------------------------------


def test_held_out_chats_are_scored_by_their_answers() -> None:
    rows = heldout_rows(CHATS, EOT, 11)
    assert (
        isinstance(rows, HeldoutChats)
        and rows.complete
        and rows.scores == "answers"
        and rows.batch(np.zeros(1, int)).chats
    )
    assert rows.total_bytes == 1 + 2 + 1 + 1 == CHATS.doc_bytes.sum()
    batch = rows.batch(np.array([0, -1, 3]))
    assert batch.chats
    assert batch.weights.sum() == 2 + 2 and batch.end_weights.sum() == 0 and batch.bytes == batch.sizes.sum()
    assert isinstance(heldout_rows(encode_documents_of("a"), EOT, 4), HeldoutRows)


def encode_documents_of(text: str):
    from data.store import encode_documents

    return encode_documents([Document("a", text.encode())], TOKENIZER)


def test_a_cut_held_out_chat_counts_what_was_scored() -> None:
    rows = heldout_rows(CHATS, EOT, 8)
    assert not rows.complete and rows.total_bytes == 1 + 2 + 1 and rows.n_rows == 4
    every = rows.batch(np.arange(4))
    assert every.bytes == rows.total_bytes and every.weights.sum() == 2 + 2 + 2
    with pytest.raises(DataError, match="no held-out chat .* first 1 tokens"):
        heldout_rows(CHATS, EOT, 1)


# -- the cache ---------------------------------------------------------------------------------------------------------

TURNS = [Message("user", "é?"), Message("assistant", "yes")]


def test_the_cache_gives_back_what_was_encoded(tmp_path) -> None:
    template = ChatTemplate(TOKENIZER)
    documents = [Document(str(n), document_of(TURNS * n)) for n in range(1, 4)]
    encoded = encode_chats(documents, template)
    write_chats(tmp_path, {"train": documents}, template)
    kept = load_chats(tmp_path, ["train"], template)["train"]
    for name in ("tokens", "offsets", "doc_bytes", "answers"):
        assert np.array_equal(getattr(kept, name), getattr(encoded, name)), name
    assert encoded.doc_bytes.tolist() == [3, 6, 9]
    (tmp_path / "train.answers.npy").write_bytes((tmp_path / "train.tokens.npy").read_bytes())
    with pytest.raises(DataError, match="answers.npy has changed"):
        load_chats(tmp_path, ["train"], template)


def test_a_data_set_of_chats(config, tmp_path) -> None:
    rows = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config(
        data="jsonl",
        data_root=str(tmp_path),
        train_files="a.jsonl",
        training_mode="instruction_finetuning",
        train_seq_len=160,
    )
    first, again = (load_dataset(cfg, cache_dir=tmp_path / "cache") for _ in range(2))
    assert first.chats and isinstance(first.training_rows(160), WholeRows)
    assert np.array_equal(first.train.answers, again.train.answers)
    said = sum(len(f"answer {n}") for n in range(60))
    assert first.train.total_bytes + first.heldout.total_bytes == said
    assert any("chats are written as ChatML has it" in note for note in first.notes)


# -- text --------------------------------------------------------------------------------------------------------------


def test_padded_text_has_all_its_tokens_and_its_end(byte_store) -> None:
    rows = in_order(WholeRows(byte_store, EOT, 60, packing=False))
    batch = rows.batch(np.arange(byte_store.n_docs))
    targets = np.minimum(byte_store.lengths_of(np.arange(byte_store.n_docs)) + 1, 60)
    assert batch.weights.sum(1).tolist() == targets.tolist()
    text = np.minimum(byte_store.doc_bytes, 60)
    assert batch.bytes == text.sum() and rows.cut_documents == (byte_store.doc_bytes + 1 > 60).sum()
    assert batch.tokens[0, : int(text[0]) + 2].tolist() == [EOT, *byte_store.text(0), EOT]
