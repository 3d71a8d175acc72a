"""What rows of instruction data say, in every shape, and what a bad one says."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import load_corpus
from data.chats.messages import Message, chat_document, messages_of
from data.chats.store import encode_chats
from data.chats.template import ChatTemplate
from data.corpus import Document
from data.errors import DataError
from data.tokenizers import ByteTokenizer

CHAT = [Message("user", "hi"), Message("assistant", "hello")]
SHAPES = {
    "messages": ({"messages": [{"role": r, "content": c} for r, c in CHAT]}, "text"),
    "by name": ({"turns": [{"role": r, "content": c} for r, c in CHAT], "text": "no"}, "turns"),
    "conversations": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        "text",
    ),
    "prompt": ({"prompt": "hi", "response": "hello", "id": 7}, "text"),
    "list": ({"instruction": "hi", "input": "", "output": "hello"}, ["instruction", "input", "output"]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_chat(shape) -> None:
    row, text_field = SHAPES[shape]
    assert messages_of(chat_document(row, text_field, "here")) == CHAT


def test_of_a_list_the_fields_that_are_not_empty_are_the_question() -> None:
    row = {"instruction": "add", "input": "1 and 2", "output": "3"}
    chat = messages_of(chat_document(row, ["instruction", "input", "output"], "here"))
    assert chat == [Message("user", "add\n\n1 and 2"), Message("assistant", "3")]


def test_what_is_null_or_empty_is_left_out() -> None:
    assert chat_document({"messages": None}, "text", "here") is None
    assert chat_document({"messages": []}, "text", "here") == b""
    assert chat_document({"prompt": "hi", "response": None}, "text", "here") is None


def test_bytes_of_answers_are_utf8_and_a_lone_surrogate_is_replaced() -> None:
    turns = [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "é"}]
    document = chat_document({"messages": turns}, "text", "here")
    assert messages_of(document)[0].content == "\ufffd"
    chats = encode_chats([Document("a", document)], ChatTemplate(ByteTokenizer()))
    assert chats.doc_bytes.tolist() == [2]


@pytest.mark.parametrize(
    ("row", "text_field", "message"),
    [
        ({"id": 1, "body": "x"}, "text", r"here holds none of messages .* \(it has 'id', 'body'\)"),
        ({"id": 1}, "turns", r"here holds no field 'turns' \(it has 'id'\)"),
        ({"prompt": "x"}, ["prompt", "answer"], r"no field 'answer' \(it has 'prompt'\)"),
        ({"text": "plain", "id": 1}, "text", r"'text' is of type str, and a chat is a list of turns.*'id'"),
        ({"messages": ["hi"]}, "text", "turn 1 of 'messages' is of type str"),
        ({"messages": [{"role": "user"}]}, "text", "has 'role', and a turn has role and content"),
        ({"messages": [{"role": "usr", "content": ""}]}, "text", "'role': .*'usr'.*Did you mean 'user'"),
        ({"messages": [{"role": "user", "content": None}]}, "text", "'content' is null, and must be"),
        ({"prompt": 3, "response": "x"}, "text", "'prompt' is of type int, and must be a string"),
    ],
)
def test_a_bad_row_is_named_with_its_fields(row, text_field, message) -> None:
    with pytest.raises(DataError, match=message):
        chat_document(row, text_field, "here")


@pytest.mark.parametrize("source", ["jsonl", "parquet", "hf"])
def test_every_source_with_rows_has_chats(source, config, tmp_path) -> None:
    rows = [SHAPES["messages"][0] | {"id": number} for number in range(3)]
    for number, row in enumerate(rows):
        row["messages"] = [*row["messages"], {"role": "user", "content": str(number)}]
    fields = {"data": source, "training_mode": "instruction_finetuning", "data_root": str(tmp_path)}
    if source == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        fields["train_files"] = "a.jsonl"
    elif source == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        fields["train_files"] = "a.parquet"
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "mine"))
        fields |= {"dataset_name": "mine", "eval_split": None}
    corpus = load_corpus(config(**fields), tmp_path / "cache")[0]
    found = sorted(messages_of(text) for _, text in [*corpus.train, *corpus.heldout])
    assert corpus.chats and found == [[*CHAT, Message("user", str(n))] for n in range(3)]


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_several_fields_make_up_a_text(source, config, tmp_path) -> None:
    rows = [{"title": f"t{n}", "lead": "" if n else None, "body": f"b{n}"} for n in range(3)]
    if source == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    fields = {"data": source, "train_files": f"a.{source}", "text_field": ["title", "lead", "body"]}
    corpus = load_corpus(config(**fields, data_root=str(tmp_path)), tmp_path / "cache")[0]
    found = sorted(text for _, text in [*corpus.train, *corpus.heldout])
    assert not corpus.chats and found == [b"t0\n\nb0", b"t1\n\nb1", b"t2\n\nb2"]
