"""The standard library as a corpus, on a small stand-in folder and on the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from data import embedded
from data.corpus import is_held_out, total_bytes
from data.errors import DataError


def fake_library(root: Path) -> None:
    for number in range(60):
        (root / f"module{number}.py").write_text(f"value = {number}\n")
    for skipped in (
        "test/a.py",
        "pkg/tests/b.py",
        "idlelib/idle_test/c.py",
        "site-packages/d.py",
        "__pycache__/e.py",
    ):
        path = root / skipped
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("third = 'party'\n")
    (root / "_sysconfigdata__linux_.py").write_text("third = 'party'\n")
    (root / "notes.txt").write_text("third party")
    (root / "twin.py").write_text("value = 7\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "empty.py").write_text("")


def test_selection_and_split(tmp_path) -> None:
    fake_library(tmp_path)
    corpus = embedded.load(root=tmp_path)
    documents = [*corpus.train, *corpus.heldout]
    assert sorted(document.name for document in documents) == sorted(f"module{n}.py" for n in range(60))
    assert b"party" not in b"".join(document.text for document in documents)
    assert all(is_held_out(document.name) for document in corpus.heldout)
    assert not any(is_held_out(document.name) for document in corpus.train)
    assert corpus.notes == ("left out: 1 duplicates, 1 files that are not UTF-8",)


def test_fingerprint_sees_every_byte(tmp_path) -> None:
    fake_library(tmp_path)
    before = embedded.load(root=tmp_path).fingerprint
    assert embedded.load(root=tmp_path).fingerprint == before
    (tmp_path / "module9.py").write_text("value = 10 \n")
    assert embedded.load(root=tmp_path).fingerprint != before


def test_python_without_sources_says_what_to_do(tmp_path) -> None:
    with pytest.raises(DataError, match="data=text"):
        embedded.load(root=tmp_path)


def test_the_real_library_is_large_enough_to_learn_from() -> None:
    corpus = embedded.load()
    assert 5e6 < total_bytes(corpus.train) < 3e7
    assert 0.01 < total_bytes(corpus.heldout) / total_bytes(corpus.train) < 0.15
    texts = [document.text for document in [*corpus.train, *corpus.heldout]]
    assert len(set(texts)) == len(texts)
