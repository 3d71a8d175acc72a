"""`data=parquet`: the same documents as JSON lines, read by row group, and what a bad file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data import load_corpus, source_of
from data.errors import DataError
from data.parquet import ParquetPart
from data.stream import Row

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"document {number} says\n" + "so much " * (number % 7) for number in range(200)]


def write(path: Path, texts=TEXTS, kind=None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    column = texts if isinstance(texts, pa.Array) else pa.array(texts, kind or pa.string())
    pq.write_table(pa.table({"id": list(range(len(column))), "text": column}), path, **options)
    return path


def rows(path: Path, field: str = "text") -> list[Row]:
    return list(ParquetPart(path.name, path, field).rows())


@pytest.fixture
def load(config, tmp_path):
    """The corpus of files, relative to the test's folder."""

    def load(source="parquet", **changes):
        fields = {"data": source, "data_root": str(tmp_path), **changes}
        return load_corpus(config(**fields), tmp_path / "cache")[0]

    return load


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_kind_of_string_column_gives_its_rows(tmp_path, kind) -> None:
    texts = ["a", None, "", "b\0c", None, "\N{COCKTAIL GLASS}"] * 50
    plain = pa.string() if kind == "dictionary" else getattr(pa, kind)()
    column = pa.array(texts, plain).dictionary_encode() if kind == "dictionary" else pa.array(texts, plain)
    found = rows(write(tmp_path / "a.parquet", column, row_group_size=70))
    assert [row.place for row in found] == list(range(1, 301))
    assert [row.text for row in found] == [None if text is None else text.encode() for text in texts]


def test_the_corpus_is_that_of_the_same_json_lines(load, tmp_path) -> None:
    write(tmp_path / "p/1.parquet", TEXTS[:90], row_group_size=7)
    write(tmp_path / "p/2.parquet", [*TEXTS[90:], None, ""], compression="zstd")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    ours, lines = load(train_files="p/*.parquet"), load("jsonl", train_files="a.jsonl")
    assert ours.fingerprint == lines.fingerprint == load(input_file="p").fingerprint
    assert [d.text for d in ours.heldout] == [d.text for d in lines.heldout]
    assert "left out: rows 1 whose text is null and 1 whose text is empty" in ours.notes
    assert ours.train[0].name.startswith("1.parquet:")


def test_other_columns_are_not_looked_at(load, tmp_path) -> None:
    """Neither their types, which differ by file, nor their bytes, which are damaged."""
    for name, other, part in (("1", list(range(90)), TEXTS[:90]), ("2", ["x"] * 110, TEXTS[90:])):
        pq.write_table(
            pa.table({"other": other, "text": part}), tmp_path / f"{name}.parquet", compression="none"
        )
    path = tmp_path / "1.parquet"
    raw = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    path.write_bytes(raw[:start] + b"\xff" * 40 + raw[start + 40 :])
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(path, columns=["other"])
    corpus = load(train_files="*.parquet")
    assert {document.text.decode() for document in [*corpus.train, *corpus.heldout]} == set(TEXTS)


def test_a_column_of_nulls_alone_is_no_text(load, tmp_path) -> None:
    write(tmp_path / "a.parquet", pa.nulls(3))
    with pytest.raises(DataError, match=r"a.parquet has no text \(left out: rows 3 whose text is null\)"):
        load(train_files="a.parquet")


@pytest.mark.parametrize("column", [[1, 2], [1.5], [True], [["a"]], [{"a": "b"}], [b"bytes"]])
def test_a_column_of_something_else_is_refused(tmp_path, column) -> None:
    path = write(tmp_path / "a.parquet", pa.array(column))
    with pytest.raises(
        DataError, match=r"a.parquet': column 'text' is of type .*, and the text of a document is"
    ):
        rows(path)


def test_a_missing_column_names_those_that_are_there(tmp_path) -> None:
    path = write(tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"lacks the column 'txt' \(it has 'id', 'text'\).*Did you mean 'text'"
    ):
        rows(path, "txt")
    assert [row.text for row in rows(path)] == [text.encode() for text in TEXTS]


def test_a_row_that_is_not_utf8_is_named(tmp_path) -> None:
    column = pa.array([b"good", b"caf\xe9", b"good"], pa.binary()).view(pa.string())
    with pytest.raises(DataError, match="a.parquet', row 2 is not UTF-8: byte 0xe9 at byte 3"):
        rows(write(tmp_path / "a.parquet", column))


@pytest.mark.parametrize("how", ["cut off", "empty", "text", "damaged"])
def test_an_unreadable_file_is_named(load, tmp_path, how) -> None:
    path = write(tmp_path / "a.parquet", row_group_size=50, compression="none")
    raw = path.read_bytes()
    start = pq.ParquetFile(path).metadata.row_group(0).column(1).dictionary_page_offset
    damaged = raw[:start] + b"\xff" * 40 + raw[start + 40 :]
    path.write_bytes({"cut off": raw[:-9], "empty": b"", "text": b"hello " * 99, "damaged": damaged}[how])
    with pytest.raises(
        DataError, match=r"a.parquet' cannot be read as parquet from its start: .*Fetch it again"
    ):
        load(train_files="a.parquet")


def test_row_groups_are_read_one_by_one(tmp_path) -> None:
    texts = [f"{number:08}" * 1280 for number in range(64 * 100)]  # 10 KB each, 64 groups of 1 MB
    path = write(tmp_path / "a.parquet", texts, row_group_size=100, use_dictionary=False, compression="none")
    assert path.stat().st_size > 60_000_000
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    try:
        pa.set_memory_pool(pool)
        count = sum(len(row.text or b"") for row in ParquetPart("a", path, "text").rows())
    finally:
        pa.set_memory_pool(before)
    assert count == 64 * 100 * 10240 and 0 < pool.max_memory() < 16_000_000


def test_files_of_two_kinds_must_be_told_apart(load, tmp_path) -> None:
    write(tmp_path / "x/a.parquet")
    (tmp_path / "x/b.jsonl").write_text('{"text": "x"}\n')
    for source, other in (("parquet", "jsonl"), ("jsonl", "parquet")):
        with pytest.raises(
            DataError, match=rf"holds 1 files of {source} and 1 of {other}.*'.*x/\*\.{source}'"
        ):
            load(source, input_file="x")
    with pytest.raises(DataError, match=r"train_files: '.*b.jsonl' is a file of jsonl. Set data=jsonl"):
        load(train_files="x/*")
    assert len(load(train_files="x/*.parquet").train)


def test_without_its_package_the_extra_is_named(load, tmp_path, monkeypatch) -> None:
    write(tmp_path / "a.parquet")
    monkeypatch.setattr("data.parquet.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs the package pyarrow: pip install -e '\.\[data\]'"):
        load(train_files="a.parquet")


def test_a_file_alone_means_its_source() -> None:
    assert source_of("input_file", "a.parquet") == source_of("train_files", ["x/*.parquet"]) == "parquet"
