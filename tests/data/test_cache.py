"""Digests of large files, which are read once."""

import hashlib
import os

import pytest

import data.cache
from data.cache import file_digest, kept_digest


@pytest.fixture
def read(tmp_path, monkeypatch):
    """What is read for a digest."""
    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path / "cache"))
    paths = []
    monkeypatch.setattr(data.cache, "file_digest", lambda path: paths.append(path) or file_digest(path))
    return paths


def test_a_file_is_read_once_as_long_as_it_stays_what_it_was(tmp_path, read):
    path, link = tmp_path / "weights", tmp_path / "link"
    path.write_bytes(b"one")
    link.symlink_to(path)
    assert kept_digest(path) == kept_digest(link) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 1
    path.write_bytes(b"three")
    assert kept_digest(path) == hashlib.sha256(b"three").hexdigest()
    path.write_bytes(b"other")
    os.utime(path, ns=(0, 5))
    assert kept_digest(path) == hashlib.sha256(b"other").hexdigest() and len(read) == 3


def test_what_was_kept_and_is_no_digest_is_not_believed(tmp_path, read):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    wanted = kept_digest(path)
    (record,) = (tmp_path / "cache" / "checked").iterdir()
    for rubbish in (b"", b"\xff\xfe", wanted[:10].encode()):
        record.write_bytes(rubbish)
        assert kept_digest(path) == wanted
    assert len(read) == 4


def test_where_nothing_can_be_kept_it_is_read_each_time(tmp_path, read, monkeypatch):
    (tmp_path / "file").write_bytes(b"one")
    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path / "file"))
    assert kept_digest(tmp_path / "file") == kept_digest(tmp_path / "file")
    assert len(read) == 2
