"""The text of a stream in the cache: read once, whole, and never taken for what it is not."""

from __future__ import annotations

import errno
import hashlib
import os
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from data import corpus as corpus_module
from data import load_dataset
from data.arrays import ArrayWriter, map_array
from data.bpe import BpeTokenizer
from data.corpus import Document, fingerprint, in_hash_order, total_bytes
from data.errors import DataError
from data.kept import keep_text
from data.near_copies import shares_in_training
from data.store import encode_documents, load_stores, write_stores
from data.stream import FilePart, Row, Stream
from data.tokenizers import ByteTokenizer

TEXTS = [f"text {number} ".encode() * (1 + number % 50) for number in range(300)]


@dataclass(frozen=True)
class Lines(FilePart):
    """A file whose lines are documents; `reads` counts how often it is read."""

    reads: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[Row]:
        self.reads.append(self.name)
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield Row(number, line[:-1])


def write(folder: Path, names=("a", "b", "c"), texts=TEXTS, old=True) -> list[Lines]:
    """The texts in as many files; `old`: changed long enough ago to be trusted."""
    parts = []
    for number, name in enumerate(names):
        path = folder / f"{name}.lines"
        path.write_bytes(b"".join(text + b"\n" for text in texts[number :: len(names)]))
        if old:
            os.utime(path, (1_000_000_000, 1_000_000_000 + number))
        parts.append(Lines(path.name, path))
    return parts


def stream(train, heldout=None, **changes) -> Stream:
    return Stream("lines", train, heldout, {"source": "lines"}, **changes)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def test_kept_documents_are_those_of_a_list(tmp_path, cache) -> None:
    corpus = keep_text(stream(write(tmp_path)), cache, lambda text: None)
    for side in (corpus.train, corpus.heldout):
        listed = list(side)
        assert listed == [side[index] for index in range(len(side))] and side[-1] == listed[-1]
        assert side.sizes.tolist() == [len(document.text) for document in listed]
        assert total_bytes(side) == total_bytes(listed)
        digests = [hashlib.sha256(document.text).digest() for document in listed]
        assert [row.tobytes() for row in side.digests] == digests
        ordered = [document.text for document in in_hash_order(side)]
        assert ordered == sorted((d.text for d in listed), key=lambda text: hashlib.sha256(text).digest()[:8])
        chosen = side.select(np.array([3, 1]))
        assert (
            list(chosen) == [listed[3], listed[1]] == list(chosen[:])
            and chosen.select(np.array([1]))[0] == listed[1]
        )
        with pytest.raises(IndexError):
            side[len(side)]
    nameless = [[Document("", document.text) for document in side] for side in (corpus.train, corpus.heldout)]
    assert corpus.fingerprint == fingerprint(*nameless) == corpus.content
    assert [d.name for d in corpus.train if d.text == TEXTS[4]] == ["b.lines:2"]
    assert shares_in_training(corpus.train, corpus.heldout) == shares_in_training(*nameless)


def test_files_are_read_once_and_again_only_when_they_change(tmp_path, cache) -> None:
    parts = write(tmp_path)
    first = keep_text(stream(parts), cache, lambda text: None)
    list(first.train), list(first.train)
    again = keep_text(stream(parts), cache, lambda text: None)
    assert again.fingerprint == first.fingerprint and list(again.heldout) == list(first.heldout)
    assert [part.reads for part in parts] == [["a.lines"], ["b.lines"], ["c.lines"]]
    raw = parts[1].path.read_bytes()
    parts[1].path.write_bytes(raw.replace(b"text", b"tent"))
    assert keep_text(stream(parts), cache, lambda text: None).fingerprint != first.fingerprint
    assert [len(part.reads) for part in parts] == [2, 2, 2]
    # What was opened stays readable, whatever becomes of the cache and the files.
    for part in parts:
        part.path.unlink()
    assert len(list(first.train)) == len(first.train)


def test_of_several_at_once_one_reads_and_all_have_the_text(tmp_path, cache) -> None:
    parts = write(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: keep_text(stream(parts), cache), range(4)))
    assert {corpus.fingerprint for corpus in found} == {found[0].fingerprint}
    assert [len(part.reads) for part in parts] == [1, 1, 1]
    assert all(list(corpus.train) == list(found[0].train) for corpus in found)


def test_what_was_changed_just_now_is_not_trusted(tmp_path, cache) -> None:
    """A file may change twice within one tick of its clock."""
    parts = write(tmp_path, old=False)
    keep_text(stream(parts), cache, lambda text: None)
    keep_text(stream(parts), cache, lambda text: None)
    assert [len(part.reads) for part in parts] == [2, 2, 2]


@pytest.mark.parametrize(
    "other", [{"heldout": True}, {"by_hash": True}, {"read_as": "field"}, {"folder": True}]
)
def test_a_key_holds_all_that_decides_the_text(tmp_path, cache, other) -> None:
    parts = write(tmp_path)
    keep_text(stream(parts), cache, lambda text: None)
    (tmp_path / "x").mkdir()
    changed = {
        "heldout": lambda: stream(parts[:2], parts[2:]),
        "by_hash": lambda: stream(parts, by_hash=True),
        "read_as": lambda: Stream("lines", parts, None, {"source": "lines", "text_field": "x"}),
        "folder": lambda: stream(write(tmp_path / "x", texts=[text.upper() for text in TEXTS])),
    }[next(iter(other))]()
    keep_text(changed, cache, lambda text: None)
    assert len(list((cache / "texts").glob("*/meta.json"))) == 2


@pytest.mark.parametrize("how", ["text", "ends", "meta", "folder"])
def test_what_is_damaged_in_the_cache_is_read_again(tmp_path, cache, how) -> None:
    parts = write(tmp_path)
    first = keep_text(stream(parts), cache, lambda text: None)
    documents = list(first.train)
    (folder,) = (path for path in (cache / "texts").iterdir() if path.is_dir())
    path = {"text": "train.text", "ends": "heldout.ends.npy", "meta": "meta.json"}.get(how)
    if path is None:
        (folder / "train.digests.npy").unlink()
    else:
        (folder / path).write_bytes((folder / path).read_bytes()[:-9])
    again = keep_text(stream(parts), cache, lambda text: None)
    assert again.fingerprint == first.fingerprint and list(again.train) == documents
    assert [len(part.reads) for part in parts] == [2, 2, 2]


def test_a_read_may_give_less_than_was_asked_for(tmp_path, cache, monkeypatch) -> None:
    corpus = keep_text(stream(write(tmp_path)), cache, lambda text: None)
    documents, read = list(corpus.train), os.pread
    monkeypatch.setattr("data.kept.os.pread", lambda file, size, start: read(file, min(size, 1000), start))
    assert list(corpus.train) == documents


def test_text_that_vanishes_from_an_open_file_is_named(tmp_path, cache) -> None:
    corpus = keep_text(stream(write(tmp_path)), cache, lambda text: None)
    (path,) = (cache / "texts").glob("*/train.text")
    with open(path, "r+b") as file:
        file.truncate(5)
    with pytest.raises(DataError, match=r"train.text has changed since it was written"):
        list(corpus.train)


@dataclass(frozen=True)
class Growing(Lines):
    """Another line comes while the file is read; the reader may trip over it."""

    trips: bool = False

    def rows(self) -> Iterator[Row]:
        yield from super().rows()
        with open(self.path, "ab") as file:
            file.write(b"late\n")
        if self.trips:
            raise DataError("line 7 is half a line")


@pytest.mark.parametrize("trips", [False, True])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, cache, trips) -> None:
    parts = write(tmp_path)
    parts[1] = Growing(parts[1].name, parts[1].path, trips=trips)
    with pytest.raises(
        DataError, match="b.lines was changed while it was read. Start again when it is complete"
    ):
        keep_text(stream(parts), cache, lambda text: None)
    assert not [path for path in (cache / "texts").iterdir() if path.is_dir()]


@dataclass(frozen=True)
class Vanishing(Lines):
    def rows(self) -> Iterator[Row]:
        yield from super().rows()
        self.path.unlink()


def test_a_file_that_vanishes_while_it_is_read_is_named(tmp_path, cache) -> None:
    parts = write(tmp_path)
    parts[2] = Vanishing(parts[2].name, parts[2].path)
    with pytest.raises(DataError, match="c.lines' cannot be read: No such file"):
        keep_text(stream(parts), cache, lambda text: None)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where", ["data.kept._Side.add", "data.kept.write_atomic", "data.arrays.ArrayWriter.close"]
)
def test_a_full_disk_says_where_room_is_needed_and_leaves_nothing(
    tmp_path, cache, monkeypatch, where
) -> None:
    parts = write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(
            DataError, match=r"cannot be kept in .*texts: No space left.*MYTRAINER_CACHE=<folder"
        ):
            keep_text(stream(parts), cache, lambda text: None)
    assert not [path for path in (cache / "texts").iterdir() if path.is_dir()]
    assert len(keep_text(stream(parts), cache, lambda text: None).train)


def test_a_full_disk_under_the_tokens_of_a_stream_ends_the_run(config, tmp_path, cache, monkeypatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "text number {number}"}}\n' for number in range(99)))
    monkeypatch.setattr("data.store.write_atomic", full)
    with pytest.raises(
        DataError, match=r"tokens of a.jsonl cannot be written to .*: No space left.*MYTRAINER_CACHE"
    ):
        load_dataset(config(data="jsonl", train_files=str(path)), cache_dir=cache)


def test_what_is_kept_is_said_with_size_and_place(tmp_path, cache) -> None:
    corpus = keep_text(stream(write(tmp_path)), cache, lambda text: None)
    (folder,) = (path for path in (cache / "texts").iterdir() if path.is_dir())
    assert f"text kept in the cache: {sum(map(len, TEXTS)):,} bytes in {folder}" in corpus.notes


def test_an_array_written_piece_by_piece_is_what_numpy_writes(tmp_path) -> None:
    for values in (
        np.arange(100, dtype=np.uint16),
        np.zeros((0, 32), np.uint8),
        np.arange(9.0).reshape(-1, 3),
    ):
        with open(tmp_path / "pieces.npy", "wb") as file:
            writer = ArrayWriter(file, values.dtype, values.shape[1:])
            for start in range(0, len(values), 7):
                writer.append(values[start : start + 7])
            writer.close()
        np.save(tmp_path / "whole.npy", values)
        assert (tmp_path / "pieces.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
        assert (map_array(tmp_path / "pieces.npy") == values).all()


@pytest.mark.parametrize("lossy", [False, True])
def test_tokens_written_one_by_one_are_those_of_memory(tmp_path, documents, bpe, monkeypatch, lossy) -> None:
    tokenizer: BpeTokenizer | ByteTokenizer = bpe
    if lossy:
        encode = tokenizer.encode
        monkeypatch.setattr(tokenizer, "encode", lambda text: encode(text[:40]))
    write_stores(tmp_path, {"train": documents, "heldout": documents[:3]}, tokenizer)
    mapped = load_stores(tmp_path, ["train", "heldout"], tokenizer)
    for side, those in (("train", documents), ("heldout", documents[:3])):
        expected = encode_documents(those, tokenizer)
        for name in ("tokens", "offsets", "doc_bytes", "lossy", "raw"):
            ours, theirs = getattr(mapped[side], name), getattr(expected, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or (ours.dtype == theirs.dtype and np.array_equal(ours, theirs))
        assert [mapped[side].text(index) for index in range(len(those))] == [d.text for d in those]


@pytest.mark.parametrize("n", [0, 1, 5, 900])
@pytest.mark.parametrize(("together", "looked_at"), [(4096, 1 << 17), (3, 7), (1, 1000)])
def test_the_order_of_digests_is_that_of_one_sort(monkeypatch, n, together, looked_at) -> None:
    monkeypatch.setattr(corpus_module, "_TOGETHER", together)
    monkeypatch.setattr(corpus_module, "_LOOKED_AT", looked_at)
    digests = np.random.default_rng(n).integers(0, 256, (n, 32), dtype=np.uint8)
    digests[n // 2 :, :8] = digests[: n - n // 2, :8]  # equal ones stay as they lie
    digests[:1, :8] = 255
    border = (1 << 64) * together // max(n, together) - (n <= together)  # the first value of the second range
    digests[1:2, :8] = np.frombuffer(border.to_bytes(8, "big"), dtype=np.uint8)
    found = [place for places in corpus_module._by_digest(digests) for place in places.tolist()]
    assert found == sorted(range(n), key=lambda place: bytes(digests[place, :8]))


def test_the_first_documents_by_digest_are_found_without_sorting_all() -> None:
    digests = np.random.default_rng(0).integers(0, 256, (1_000_000, 32), dtype=np.uint8)
    tracemalloc.start()
    try:
        first = next(corpus_module._by_digest(digests))
        assert tracemalloc.get_traced_memory()[1] < 4 * len(digests), "a sort of all takes 16 bytes of each"
    finally:
        tracemalloc.stop()
    assert 3000 < len(first) < 5500


def test_text_in_the_cache_that_was_changed_is_read_anew(tmp_path):
    """Under its fingerprint no other text is trained on, whatever happened to the file."""
    parts = write(tmp_path)
    before = keep_text(stream(parts), tmp_path / "cache")
    (kept,) = (tmp_path / "cache" / "texts").glob("*/train.text")
    raw = bytearray(kept.read_bytes())
    raw[:4] = b"XXXX"
    kept.write_bytes(raw)
    os.utime(kept, (2e9, 2e9))
    after = keep_text(stream(parts), tmp_path / "cache")
    assert list(after.train) == [d for d in after.train if b"XXXX" not in d.text]
    assert after.fingerprint == before.fingerprint and parts[0].reads.count("a.lines") == 2
