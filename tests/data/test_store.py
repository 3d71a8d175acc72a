"""Tokens in files: hashed once, known by size and time of change from then on, and read where rows lie alone."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from data import shards, store
from data.corpus import Document
from data.errors import DataError
from data.rows import TrainingRows
from data.shards import ShardTokens
from data.store import TokenStore, load_stores, write_stores
from data.tokenizers import ByteTokenizer


@pytest.fixture
def folder(tmp_path: Path, documents: list[Document]) -> Path:
    write_stores(tmp_path, {"train": documents, "heldout": documents[:2]}, ByteTokenizer())
    return tmp_path


def opened(folder: Path) -> TokenStore:
    return load_stores(folder, ["train"], ByteTokenizer())["train"]


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that were hashed."""
    names: list[str] = []
    digest = store.file_digest
    monkeypatch.setattr(store, "file_digest", lambda path: names.append(path.name) or digest(path))
    return names


def test_files_are_hashed_once_by_who_writes_them(folder, hashed) -> None:
    opened(folder)
    opened(folder)
    assert hashed == []


def test_files_that_look_otherwise_are_hashed_by_who_opens_them_first(folder, hashed) -> None:
    for path in folder.glob("*.npy"):  # copied, or unpacked
        os.utime(path, (1e9, 1e9))
    opened(folder)
    assert sorted(hashed) == sorted(path.name for path in folder.glob("*.npy"))
    hashed.clear()
    opened(folder)
    assert hashed == []


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"train.tokens.npy": [1'])
def test_without_their_looks_files_are_hashed(folder, hashed, content) -> None:
    (folder / "meta.stamps").write_bytes(content)
    opened(folder)
    assert len(hashed) == 6
    hashed.clear()
    opened(folder)
    assert hashed == []


@pytest.mark.parametrize("how", ["longer", "same length"])
def test_a_file_that_changed_since_it_was_hashed_is_noticed(folder, how) -> None:
    path = folder / "train.tokens.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw + b"\0\0" if how == "longer" else raw)
    os.utime(path, (1e9, 1e9))
    with pytest.raises(DataError, match=r"train.tokens.npy has changed since it was written"):
        opened(folder)


def test_who_may_not_write_into_the_cache_reads_it_all_the_same(folder, hashed, monkeypatch) -> None:
    (folder / "meta.stamps").unlink()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "write_atomic", refuse)
    assert opened(folder).n_docs == 12 and len(hashed) == 6


def test_tokens_read_from_their_file_are_those_in_memory(folder, byte_store) -> None:
    found = opened(folder)
    tokens = found.tokens
    assert isinstance(tokens, ShardTokens) and len(tokens) == len(byte_store.tokens)
    assert tokens.nbytes == byte_store.tokens.nbytes and tokens.dtype == byte_store.tokens.dtype
    for start, stop in ((0, len(tokens)), (5, 5), (5, 9), (40, 4000), (len(tokens) - 3, len(tokens))):
        assert np.array_equal(tokens[start:stop], byte_store.tokens[start:stop])
    places = np.array([[3, 4, 5, 900], [2, 1, 0, len(tokens) - 1]])
    assert np.array_equal(tokens[places], byte_store.tokens[places])
    rows = [TrainingRows(source, 256, 100, lookahead=2, seed=1) for source in (found, byte_store)]
    one, other = (these.batch(np.arange(0, 400, 7)) for these in rows)
    assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.doc_ids, other.doc_ids)
    assert one.bytes == other.bytes


def test_a_process_reads_the_tokens_of_its_own_rows_alone(folder, monkeypatch) -> None:
    rows = TrainingRows(opened(folder), 256, 64, seed=1)
    read: list[tuple[int, int]] = []  # bytes of the file
    preadv = os.preadv

    def counted(handle: int, buffers: list[memoryview], offset: int) -> int:
        read.append((offset, sum(len(buffer) for buffer in buffers)))
        return preadv(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("read beside the rows"))
    batch = rows.batch(np.arange(32, 48))  # of the second of four processes
    assert sum(size for _, size in read) == 2 * int((batch.tokens != 256).sum())
    assert len(read) <= int(batch.doc_ids[:, -1].sum()) + 16  # one for each document of a row


def test_the_cache_may_be_deleted_while_it_is_read(folder, byte_store) -> None:
    found = opened(folder)
    for path in folder.iterdir():
        path.unlink()
    rows = TrainingRows(found, 256, 100)
    assert np.array_equal(
        rows.batch(np.arange(9)).tokens, TrainingRows(byte_store, 256, 100).batch(np.arange(9)).tokens
    )


def test_another_process_may_write_the_same_file_at_any_moment(folder, byte_store, monkeypatch) -> None:
    """As several do that find nothing in the cache: just before it is opened, here."""

    def opened_late(path: str | Path) -> FileIO:
        fresh = folder / "fresh"
        fresh.write_bytes(Path(path).read_bytes())
        os.utime(fresh, (1e9, 1e9))
        os.replace(fresh, path)
        return FileIO(path)

    monkeypatch.setattr(shards, "FileIO", opened_late)
    assert np.array_equal(opened(folder).tokens[:8], byte_store.tokens[:8])


def test_a_file_that_is_gone_before_it_is_read_is_said_to_be_gone(folder) -> None:
    files = opened(folder).tokens.files
    (folder / "train.tokens.npy").unlink()
    files._files.clear()  # as where more files are open than there is room for
    with pytest.raises(DataError, match=r"train.tokens.npy' is gone: .*made again by a new start"):
        files.read(0, 1)


@pytest.mark.parametrize("size", [200, 40_000])
def test_a_cached_file_that_shrinks_is_named(folder, size) -> None:
    rows = TrainingRows(opened(folder), 256, 100)
    os.truncate(folder / "train.tokens.npy", size)
    with pytest.raises(DataError, match=r"train.tokens.npy' has changed since .*made again by a new start"):
        rows.batch(np.arange(rows.rows_per_epoch))
