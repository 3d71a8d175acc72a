"""Caches that can be kept and those that cannot; disks."""

import errno
import os
from collections import namedtuple

import pytest

from trainer.doctor import storage
from trainer.doctor.lines import lines_of


def cache(monkeypatch, path):
    monkeypatch.setenv("MYTRAINER_CACHE", str(path))
    return storage._ours()


def test_its_place_and_size(tmp_path, monkeypatch):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "a").write_bytes(bytes(3000))
    (tmp_path / "tokens" / "b").symlink_to(tmp_path / "tokens" / "a")
    line = cache(monkeypatch, tmp_path)
    assert line.state == "ok" and line.text.startswith(f"{tmp_path}: 3.1 kB (tokens 3.1 kB")
    nothing = cache(monkeypatch, tmp_path / "new" / "one")
    assert nothing.state == "ok" and nothing.text.endswith("new/one, which is not there yet")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("there", [True, False])
def test_one_that_is_read_only(tmp_path, monkeypatch, there):
    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", read_only)
    line = cache(monkeypatch, tmp_path if there else tmp_path / "new")
    assert line.state == "problem" and "Read-only file system" in line.text
    assert "set MYTRAINER_CACHE to a folder" in line.remedy


def test_one_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert cache(monkeypatch, tmp_path / "file" / "cache").state == "problem"


@pytest.mark.parametrize("free, state", [(1e6, "problem"), (1e9, "note"), (1e12, "ok")])
def test_room_on_the_disk(tmp_path, monkeypatch, free, state):
    Usage = namedtuple("Usage", "free")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Usage(free))
    line = storage._disk("here", tmp_path / "not" / "there")
    assert line.state == state and bool(line.remedy) == (state != "ok")


def test_each_is_looked_at_though_another_raises(monkeypatch):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 1000")

    monkeypatch.setattr(storage.getpass, "getuser", nobody)
    found = {line.about: line.state for line in lines_of("storage", "trainer.doctor.storage:check")}
    assert found["cache of torch.compile"] == "problem"
    assert {"cache", "cache of triton", "disk, here"} <= found.keys()
