"""`data=jsonl`: which lines are documents, in files of every packing, and what a bad file or name says."""

from __future__ import annotations

import gzip
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from data import load_corpus, load_dataset, source_of
from data.errors import DataError
from data.jsonl import RATIO, JsonlPart
from tests.data.ranks import seed

LINES = [
    {"id": number, "text": f"document {number} says\n" + "so much " * (number % 7)} for number in range(200)
]


def packed(rows, ending="\n") -> bytes:
    return "".join(json.dumps(row) + ending for row in rows).encode()


def write(path: Path, raw: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def texts(path: Path, field: str = "text") -> list[bytes | None]:
    return [row.text for row in JsonlPart(path.name, path, field).rows()]


@pytest.fixture
def load(config, tmp_path):
    """The corpus of jsonl files, relative to the test's folder."""

    def load(cache="cache", **changes):
        fields = {"data": "jsonl", "data_root": str(tmp_path), **changes}
        return load_corpus(config(**fields), tmp_path / cache)[0]

    return load


def test_a_line_ends_at_a_line_feed_alone(tmp_path) -> None:
    odd = "a\u2028b\u0085c"
    raw = json.dumps({"text": odd}, ensure_ascii=False).encode() + b"\n"
    assert texts(write(tmp_path / "a.jsonl", raw)) == [odd.encode()] and len(odd.encode()) == 8
    unix, windows = (
        write(tmp_path / f"{n}.jsonl", packed(LINES, end)) for n, end in (("u", "\n"), ("w", "\r\n"))
    )
    assert texts(unix) == texts(windows) == [row["text"].encode() for row in LINES]


def test_blank_lines_a_byte_order_mark_and_a_missing_last_line_end_are_no_matter(tmp_path) -> None:
    raw = b"\xef\xbb\xbf" + packed(LINES[:2]) + b"\n  \r\n" + packed(LINES[2:3], "")
    rows = list(JsonlPart("a", write(tmp_path / "a.jsonl", raw), "text").rows())
    assert [row.place for row in rows] == [1, 2, 5]
    assert [row.text for row in rows] == [row["text"].encode() for row in LINES[:3]]


def compress(kind: str, raw: bytes) -> bytes:
    if kind == "gz":
        return gzip.compress(raw, mtime=0)
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(raw)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_members_of_a_compressed_file_are_read_one_behind_the_other(tmp_path, kind) -> None:
    both = compress(kind, packed(LINES[:1])) + compress(kind, packed(LINES[1:2]))
    path = write(tmp_path / f"a.jsonl.{kind}", both)
    assert texts(path) == [row["text"].encode() for row in LINES[:2]]
    # A line may lie in two members, and the name says nothing.
    raw = packed(LINES)
    halves = compress(kind, raw[:777]) + compress(kind, raw[777:])
    assert texts(write(tmp_path / "b.txt", halves)) == [row["text"].encode() for row in LINES]


@pytest.mark.parametrize("number", [0x184D2A50, 0x184D2A5F])
def test_frames_of_zstd_that_are_to_be_skipped_are_skipped(tmp_path, number) -> None:
    frames = [compress("zst", packed(LINES[:1])), compress("zst", packed(LINES[1:2]))]
    skipped = struct.pack("<II", number, 5000) + b"x" * 5000  # more than is unpacked together
    path = write(tmp_path / "a.jsonl.zst", skipped + frames[0] + skipped + frames[1] + skipped)
    assert texts(path) == [row["text"].encode() for row in LINES[:2]]
    with pytest.raises(DataError, match=r"a.jsonl.zst' is damaged or cut off"):
        texts(write(path, skipped[:-1]))


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
@pytest.mark.parametrize("begin", [b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"])
def test_a_zstd_file_of_which_next_to_nothing_is_left_is_cut_off(tmp_path, begin, kept) -> None:
    pytest.importorskip("zstandard")
    with pytest.raises(DataError, match=r"cut.jsonl.zst' is damaged or cut off"):
        texts(write(tmp_path / "cut.jsonl.zst", begin[:kept]))


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_that_is_cut_off_or_damaged_is_named(tmp_path, kind) -> None:
    whole = compress(kind, packed(LINES[:1])) + compress(kind, packed(LINES[1:2]))
    damaged = whole[:-30] + bytes(byte ^ 255 for byte in whole[-30:-20]) + whole[-20:]
    for raw in (whole[:-5], damaged):
        path = write(tmp_path / f"cut.jsonl.{kind}", raw)
        with pytest.raises(DataError, match=rf"cut.jsonl.{kind}' is damaged or cut off"):
            texts(path)


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("raw", [b'{"text": "a"}\n' * (1 << 16), b" " * (1 << 20)], ids=["rows", "one line"])
def test_a_compressed_file_that_is_made_to_fill_memory_is_named(tmp_path, monkeypatch, kind, raw) -> None:
    monkeypatch.setattr("data.jsonl.SPARED", 1 << 18)
    path = write(tmp_path / f"bomb.jsonl.{kind}", compress(kind, raw))
    with pytest.raises(DataError, match=rf"bomb.jsonl.{kind}' unpacks to more than 200 times its size"):
        for _ in JsonlPart("a", path, "text").rows():
            pass


def test_a_small_file_may_unpack_to_anything(tmp_path) -> None:
    raw = json.dumps({"text": "a" * (1 << 22)}).encode() + b"\n"
    assert len(compress("gz", raw)) * RATIO < len(raw)
    assert texts(write(tmp_path / "a.jsonl.gz", compress("gz", raw))) == [b"a" * (1 << 22)]


def test_zstd_without_its_package_names_the_extra(tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "a.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"0" * 20)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(
        DataError, match=r"zstandard is not installed: pip install -e '\.\[data\]', or unpack it: unzstd"
    ):
        texts(path)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r'"a\ud83db"', b"a\xef\xbf\xbdb"),
        (r'"\ud83d\ud83d"', b"\xef\xbf\xbd" * 2),
        (r'"\udf78"', b"\xef\xbf\xbd"),
        (r'"\ud83c\udf78"', "\N{COCKTAIL GLASS}".encode()),
        (r'"a<|endoftext|>b"', b"a<|endoftext|>b"),
        ('"\ufeffx"', "\ufeffx".encode()),
    ],
)
def test_every_string_of_json_has_bytes(tmp_path, written, text) -> None:
    assert texts(write(tmp_path / "a.jsonl", f'{{"text": {written}}}'.encode())) == [text]


def test_every_tokenizer_reads_the_same_bytes_of_odd_strings(config, bpe, tmp_path, monkeypatch) -> None:
    odd = [r"one a\ud83db", r"two \ud83c\udf78", r"three a<|endoftext|>b", r"four a\u2028b\u0085c\f"]
    right = ["one a\ufffdb", "two \N{COCKTAIL GLASS}", "three a<|endoftext|>b", "four a\u2028b\u0085c\f"]
    write(tmp_path / "a.jsonl", "".join(f'{{"text": "{line}"}}\n' for line in odd).encode())
    bpe.save(tmp_path / "bpe.json")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(seed(tmp_path / "ranks")))
    for tokenizer in ("byte", "char", str(tmp_path / "bpe.json"), "gpt2"):
        cfg = config(data="jsonl", train_files=str(tmp_path / "a.jsonl"), val_files=[], tokenizer=tokenizer)
        cfg.train_seq_len = 8
        found = load_dataset(cfg, cache_dir=tmp_path / "cache")
        stores = (found.train, found.heldout)
        assert {store.text(i).decode() for store in stores for i in range(store.n_docs)} == set(right)
        assert sum(store.total_bytes for store in stores) == len("".join(right).encode())
        assert not any(found.tokenizer.eot in store.tokens for store in stores)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 'x'}", "is not JSON: Expecting property name"),
        (b'{"text": "x"', "is not JSON"),
        (b'{"text": "x"} {"text": "y"}', "is not JSON: Extra data at column 15"),
        (b'"x"', "is a string, not a JSON object"),
        (b"null", "is null, not a JSON object"),
        (b"7", "is a number, not a JSON object"),
        (b"{}", r"lacks the field 'text' \(it is empty\)"),
        (
            b'{"txt": "x", "id": 1}',
            r"lacks the field 'text' \(it has 'txt', 'id'\)\. Set text_field=.*mean 'txt'",
        ),
        (b'{"text": 5}', "'text' is a number, and the text of a document is a string"),
        (b'{"text": ["x"]}', "'text' is a list"),
        (b'{"text": {}}', "'text' is an object"),
        (b'{"text": false}', "'text' is true or false"),
        (b'{"text": NaN}', "'text' is a number"),
        (b'{"text": "caf\xe9"}', "is not UTF-8: byte 0xe9 at byte 13"),
        (b'{"text": "x", "y": ' + b"[" * 100_000, "is nested too deeply|is not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(load, tmp_path, line, message) -> None:
    write(tmp_path / "bad.jsonl", packed(LINES[:2]) + line + b"\n" + packed(LINES[3:5]))
    with pytest.raises(DataError, match=message) as error:
        load(train_files="bad.jsonl")
    assert f"{str(tmp_path / 'bad.jsonl')!r}, line 3" in str(error.value)
    assert not list((tmp_path / "cache/texts").glob("*/meta.json"))


def test_other_fields_are_not_looked_at(tmp_path) -> None:
    rows = (
        b'{"id": %s, "text": "x"}\n' % other
        for other in (b"1", b'"a"', b"null", b"9" * 5000, b"1e999", b"NaN")
    )
    assert texts(write(tmp_path / "a.jsonl", b"".join(rows))) == [b"x"] * 6


def test_rows_without_text_are_left_out_and_counted(load, tmp_path) -> None:
    rows = [*LINES, {"text": None}, {"text": ""}, {"text": " \n"}, {"text": None}]
    write(tmp_path / "a.jsonl", packed(rows))
    corpus = load(train_files="a.jsonl")
    assert "left out: rows 2 whose text is null and 2 whose text is empty" in corpus.notes
    everything = b"".join(document.text for document in [*corpus.train, *corpus.heldout])
    assert b"None" not in everything and len(corpus.train) + len(corpus.heldout) == 200


def test_utf16_says_how_to_convert(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n'.encode("utf-16"))
    with pytest.raises(DataError, match="is utf-16 text .* iconv -f utf-16"):
        texts(path)


def test_text_field_names_another_one(load, tmp_path) -> None:
    write(tmp_path / "a.jsonl", packed([{"text": "no", "content": row["text"]} for row in LINES]))
    corpus = load(train_files="a.jsonl", text_field="content")
    assert {d.text.decode() for d in [*corpus.train, *corpus.heldout]} == {row["text"] for row in LINES}


def test_names_patterns_folders_and_lists_mean_the_same_text(load, tmp_path, monkeypatch) -> None:
    for number in range(4):
        write(
            tmp_path / f"x/{'ab'[number % 2]}/{number}.jsonl", packed(LINES[number * 50 : number * 50 + 50])
        )
    ordered = [f"x/{name}.jsonl" for name in ("a/0", "a/2", "b/1", "b/3")]
    listed = load(train_files=ordered)
    assert [document.name for document in listed.train][:1] == ["a/0.jsonl:1"]
    for fields in ({"train_files": "x/*/*.jsonl"}, {"train_files": "x/**/*.jsonl"}, {"train_files": "x"}):
        assert load(**fields).fingerprint == listed.fingerprint
    assert load(input_file="x").fingerprint == listed.fingerprint
    assert load(train_files=["x/a/*", "x/a/0.jsonl", "x/b"]).fingerprint == listed.fingerprint  # each once
    assert load(train_files=ordered[::-1]).fingerprint != listed.fingerprint  # a list is in its order
    monkeypatch.chdir(tmp_path / "x")
    assert load(train_files="*/*.jsonl", data_root=None).fingerprint == listed.fingerprint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "data=jsonl needs train_files=<files> or input_file="),
        ({"train_files": "a.jsonl", "input_file": "a.jsonl"}, "both name what is trained on"),
        ({"train_files": "b*.jsonl"}, r"train_files: '.*b\*\.jsonl' matches no file"),
        ({"train_files": "aa.jsonl"}, "'.*aa.jsonl' does not exist. Did you mean 'a.jsonl'"),
        ({"train_files": "a.jsonl", "val_files": "c.jsonl"}, "val_files '.*c.jsonl' does not exist"),
        ({"train_files": "a.jsonl", "val_files": "*.jsonl"}, "they are all of train_files"),
        (
            {"train_files": "empty"},
            r"has no file of jsonl \(ignored 1 files that are not jsonl by suffix: .md",
        ),
        ({"train_files": "split"}, r"val.jsonl: called as held-out text usually is.*val_files=val.jsonl"),
        ({"train_files": "split/*.jsonl"}, "called as held-out text usually is"),
        ({"train_files": "dangling.jsonl"}, "is a link that leads nowhere"),
        (
            {"train_files": "a.jsonl", "text_field": ["text", "b"]},
            r"a.jsonl', line 1 lacks the field 'b' \(it has 'id', 'text'\)",
        ),
    ],
)
def test_what_names_no_text_says_so(load, tmp_path, fields, message) -> None:
    write(tmp_path / "a.jsonl", packed(LINES))
    write(tmp_path / "empty/readme.md", b"none here")
    for name in ("train", "val"):
        write(tmp_path / f"split/{name}.jsonl", packed(LINES))
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=message):
        load(**fields)


def test_a_folder_says_what_it_did_not_read_and_links_are_followed_to_files_alone(load, tmp_path) -> None:
    write(tmp_path / "x/deep/er/a.jsonl", packed(LINES))
    write(tmp_path / "elsewhere/b.jsonl", packed([{"text": f"other {n}"} for n in range(9)]))
    write(tmp_path / "x/.hidden.jsonl", b"no JSON")
    write(tmp_path / "x/notes.md", b"notes")
    (tmp_path / "x/linked.jsonl").symlink_to(tmp_path / "elsewhere/b.jsonl")
    (tmp_path / "x/again.jsonl").symlink_to(tmp_path / "x/deep/er/a.jsonl")
    (tmp_path / "x/loop").symlink_to(tmp_path / "x")
    corpus = load(input_file="x")
    assert len(corpus.train) + len(corpus.heldout) == 209  # a file that is there twice is read once
    said = "; ".join(corpus.notes)
    assert "ignored 1 files that are not jsonl by suffix: .md (1)" in said
    assert (
        "left out (hidden): .hidden.jsonl" in said
        and "links to folders, which are not followed): loop" in said
    )


def test_val_files_are_held_out_and_never_trained_on(load, tmp_path) -> None:
    write(tmp_path / "x/part1.jsonl", packed(LINES[:150]))
    write(tmp_path / "x/val.jsonl", packed(LINES[150:]))
    for fields in (
        {"input_file": "x", "val_files": "val.jsonl"},
        {"train_files": "x/*", "val_files": ["x/v*"]},
    ):
        corpus = load(**fields)
        assert [document.text.decode() for document in corpus.train] == [row["text"] for row in LINES[:150]]
        assert [document.text.decode() for document in corpus.heldout] == [row["text"] for row in LINES[150:]]
    held_out = load(train_files="x/part1.jsonl", val_files="x/val.jsonl").heldout
    write(tmp_path / "x/part2.jsonl", packed([{"text": f"more {n}"} for n in range(40)]))
    more = load(train_files="x/part*.jsonl", val_files="x/val.jsonl")  # the held-out side stays
    assert (more.heldout.digests == held_out.digests).all() and len(more.train) == 190


def test_text_that_is_held_out_is_named_and_left_out_of_training(load, tmp_path) -> None:
    write(tmp_path / "train.jsonl", packed([*LINES, *LINES[3:5]]))
    write(tmp_path / "val.jsonl", packed([LINES[3], LINES[4], {"text": "new"}]))
    corpus = load(train_files="train.jsonl", val_files="val.jsonl")
    copies = "train.jsonl:4, train.jsonl:5, train.jsonl:201 and 1 more"
    assert f"left out of training, as the same text is held out: {copies}" in corpus.notes
    assert len(corpus.heldout) == 3 and len(corpus.train) == 198
    assert not {d.text for d in corpus.train} & {d.text for d in corpus.heldout}


def test_the_split_is_by_text_whatever_it_is_packed_in_and_copies_are_on_one_side(load, tmp_path) -> None:
    write(tmp_path / "a.jsonl", packed(LINES))
    write(tmp_path / "b.jsonl.gz", compress("gz", packed(LINES[:120])))
    write(tmp_path / "c.jsonl", packed([{"other": 1, **row} for row in LINES[120:]]))
    one, two = load(train_files="a.jsonl"), load(train_files=["b.jsonl.gz", "c.jsonl"])
    assert one.fingerprint == two.fingerprint == one.content
    assert [d.text for d in one.heldout] == [d.text for d in two.heldout] and 2 <= len(one.heldout) <= 25
    write(tmp_path / "back.jsonl", packed(LINES[::-1]))
    assert {d.text for d in load(train_files="back.jsonl").heldout} == {d.text for d in one.heldout}
    write(tmp_path / "twice.jsonl", packed([*LINES, *LINES]))
    twice = load(train_files="twice.jsonl")
    assert {d.text for d in twice.heldout} == {d.text for d in one.heldout}
    assert len(twice.heldout) == 2 * len(one.heldout)


def test_more_training_text_leaves_the_held_out_text_as_it_was(load, tmp_path) -> None:
    """Named text as it is; of text that is split by hash what was held out, and a share of what came."""
    write(tmp_path / "x/1.jsonl", packed(LINES[:90]))
    write(tmp_path / "v/val.jsonl", packed(LINES[180:]))
    named, by_hash = ({"train_files": "x", "val_files": "v"}, {"train_files": "x"})
    before = [[document.text for document in load(**fields).heldout] for fields in (named, by_hash)]
    write(tmp_path / "x/2.jsonl", packed(LINES[90:180]))
    after = [[document.text for document in load(**fields).heldout] for fields in (named, by_hash)]
    assert after[0] == before[0] and len(after[0]) == 20
    assert after[1][: len(before[1])] == before[1] and 0 < len(before[1]) < len(after[1])


def test_files_of_one_name_size_and_time_are_told_apart_by_their_folder(config, tmp_path) -> None:
    cfg = config(data="jsonl", tokenizer="bpe-260", data_root=str(tmp_path))
    found = []
    for folder, word in (("a", "mats"), ("b", "cats")):
        path = write(tmp_path / folder / "train.jsonl", packed([{"text": f"{word} {n}"} for n in range(99)]))
        os.utime(path, (1e9, 1e9))
        cfg.train_files = f"{folder}/train.jsonl"
        found.append(load_dataset(cfg, cache_dir=tmp_path / "cache"))
    assert (tmp_path / "a/train.jsonl").stat().st_size == (tmp_path / "b/train.jsonl").stat().st_size
    first, second = found
    assert first.train.text(0) == b"mats 0" and second.train.text(0) == b"cats 0"
    assert first.tokenizer.digest != second.tokenizer.digest and first.cache_path != second.cache_path


def test_few_documents_hold_out_the_last_tenth_by_hash(load, tmp_path) -> None:
    few = [row for row in LINES if row["text"] not in {d.text.decode() for d in held(load, tmp_path)}][:20]
    write(tmp_path / "few.jsonl", packed(few))
    corpus = load(train_files="few.jsonl")
    assert (len(corpus.train), len(corpus.heldout)) == (18, 2)
    assert any("the last tenth by a hash of their text (few documents)" in note for note in corpus.notes)
    write(tmp_path / "one.jsonl", packed(few[:1] * 3))
    with pytest.raises(DataError, match="has one document, and two are needed to hold one out"):
        load(train_files="one.jsonl")
    write(tmp_path / "none.jsonl", packed([{"text": None}]))
    with pytest.raises(DataError, match=r"none.jsonl has no text \(left out: rows 1 whose text is null\)"):
        load(train_files="none.jsonl")


def held(load, folder):
    write(folder / "all.jsonl", packed(LINES))
    return load(train_files="all.jsonl").heldout


def test_a_hash_that_holds_out_most_of_the_text_is_refused(load, tmp_path) -> None:
    chosen = held(load, tmp_path)[0].text.decode()
    rows = [{"text": chosen}] * 300 + LINES[:30]
    write(tmp_path / "a.jsonl", packed(rows))
    with pytest.raises(
        DataError, match="documents would be held out, .*Name what is held out: val_files=<files>"
    ):
        load(train_files="a.jsonl")
    assert len(load(train_files="a.jsonl", val_files=[]).heldout) >= 300


def test_near_copies_are_found_and_dropped(load, tmp_path) -> None:
    long = [{"text": "".join(f"line {n} of the document {k}\n" for n in range(20))} for k in range(40)]
    changed = {"text": long[7]["text"] + "and one more line at its end\n"}
    write(tmp_path / "train.jsonl", packed(long))
    write(
        tmp_path / "val.jsonl",
        packed([changed, {"text": "".join(f"quite new line {n}\n" for n in range(20))}]),
    )
    fields = {"train_files": "train.jsonl", "val_files": "val.jsonl"}
    kept, dropped = load(**fields), load(near_copies="drop", **fields)
    assert len(kept.heldout) == 2 and any("val.jsonl:1" in note for note in kept.notes)
    assert [d.name for d in dropped.heldout] == ["val.jsonl:2"] and dropped.fingerprint != kept.fingerprint
    assert list(dropped.heldout)[0] == dropped.heldout[-1] == kept.heldout[1]


def test_a_file_alone_means_its_source() -> None:
    assert source_of("input_file", "x/a.JSONL.gz") == "jsonl" and source_of("input_file", "a.txt") == "text"
    assert source_of("train_files", ["a.ndjson"]) == "jsonl" and source_of("train_files", "x/*") == "jsonl"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(load, tmp_path) -> None:
    write(tmp_path / "a.jsonl", packed(LINES)).chmod(0)
    with pytest.raises(DataError, match="a.jsonl' cannot be read: Permission denied"):
        load(train_files="a.jsonl")


def test_tokens_are_those_of_the_documents_in_their_order(config, tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", packed(LINES))
    cfg = config(data="jsonl", train_files=str(path), tokenizer="bpe-270")
    dataset = load_dataset(cfg, cache_dir=tmp_path / "cache")
    size = sum(store.tokens.nbytes for store in (dataset.train, dataset.heldout))
    assert f"tokens written to the cache: {size:,} bytes in {dataset.cache_path}" in dataset.notes
    corpus = load_corpus(cfg, tmp_path / "cache")[0]
    for store, documents in ((dataset.train, corpus.train), (dataset.heldout, corpus.heldout)):
        assert [store.text(index) for index in range(store.n_docs)] == [d.text for d in documents]
        ids = [dataset.tokenizer.encode(document.text) for document in documents]
        assert np.array_equal(store.tokens, np.concatenate(ids))
    assert dataset.content == dataset.fingerprint == corpus.fingerprint
    other = load_dataset(
        config(data="jsonl", train_files=str(path)), unit="byte", cache_dir=tmp_path / "cache"
    )
    assert other.fingerprint == dataset.fingerprint
    for ours, theirs in ((other.train, dataset.train), (other.heldout, dataset.heldout)):
        assert np.array_equal(ours.doc_bytes, theirs.doc_bytes)
        assert all(ours.text(index) == theirs.text(index) for index in range(ours.n_docs))
