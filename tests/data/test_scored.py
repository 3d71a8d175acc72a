"""Which text a finished run is scored on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import normalizers

from data import load_dataset
from data.errors import DataError
from data.huggingface.tokenizer import HuggingFaceTokenizer
from data.scored import text_to_score
from data.tokenizers import ByteTokenizer
from tests.data.foreign import byte_level

BYTES = ByteTokenizer()


@pytest.fixture
def run(config, tmp_path, monkeypatch):
    """A run on train/book.txt, found by data_root."""
    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/book.txt").write_text("".join(f"line {n} of the book\n" for n in range(500)))
    cfg = config(input_file="book.txt", data_root=str(tmp_path / "train"))
    return SimpleNamespace(cfg=cfg, recorded=load_dataset(cfg))


def scored(run, **changes):
    given = SimpleNamespace(**{**vars(run.cfg), **changes}) if changes else run.cfg
    return text_to_score(run.cfg, given, BYTES, vars(run.recorded))


def all_text(found) -> bytes:
    return b"".join(found.store.text(index) for index in range(found.store.n_docs))


def test_nothing_asked_for_is_the_held_out_part(run) -> None:
    found = scored(run)
    assert all_text(found).endswith(b"line 499 of the book\n") and not found.whole
    assert found.fingerprint == run.recorded.fingerprint and str(found) == "the held-out part of book.txt"


def test_another_file_is_scored_whole_and_looked_for_from_here(run, tmp_path) -> None:
    (tmp_path / "train/b.txt").write_text("of the training folder")
    (tmp_path / "b.txt").write_text("x")  # too short for two parts
    found = scored(run, input_file="b.txt", data_root=None)
    assert all_text(found) == b"x" and found.whole and str(found) == "all of b.txt" and found.notes == ()


@pytest.mark.parametrize("name", ["train/book.txt", "link.txt", "copies/renamed.txt"])
def test_the_run_s_own_text_is_never_scored_whole(run, tmp_path, name: str) -> None:
    (tmp_path / "link.txt").symlink_to("train/book.txt")
    (tmp_path / "copies").mkdir()
    shutil.copy(tmp_path / "train/book.txt", tmp_path / "copies/renamed.txt")
    found = scored(run, input_file=name, data_root=None)
    assert not found.whole and all_text(found) == all_text(scored(run))


def test_text_that_stands_in_training_is_said(run, tmp_path) -> None:
    text = Path("train/book.txt").read_text()
    (tmp_path / "part.txt").write_text(text[: len(text) // 2] + "something else\n" * 3)
    found = scored(run, input_file="part.txt", data_root=None)
    assert found.whole and found.overlap.share > 0.9
    assert any("of this text also stands in the training text" in note for note in found.notes)
    Path("train/book.txt").unlink()
    gone = scored(run, input_file="part.txt", data_root=None)
    assert gone.overlap is None and any("was not looked at" in note for note in gone.notes)


def test_data_that_changed_since_is_said(run) -> None:
    with open("train/book.txt", "a") as file:
        file.write("and one line more\n")
    for changes in ({}, {"input_file": "train/book.txt", "data_root": None}):
        assert any("does not compare with the run's own" in note for note in scored(run, **changes).notes)


def test_another_source_gives_its_held_out_part(run) -> None:
    found = scored(run, data="synthetic", input_file=None)
    assert not found.whole and "markov" in found.name and not any("compare" in note for note in found.notes)


def test_text_that_is_not_there(run) -> None:
    with pytest.raises(DataError, match="does not exist"):
        scored(run, input_file="no.txt", data_root=None)


def test_what_the_tokenizer_loses_of_the_text_is_said(run, tmp_path) -> None:
    library = byte_level()
    library.normalizer = normalizers.Lowercase()
    tokenizer = HuggingFaceTokenizer(json.loads(library.to_str()), 0, [0], {})
    (tmp_path / "b.txt").write_text("A Text")
    given = SimpleNamespace(**{**vars(run.cfg), "input_file": "b.txt", "data_root": None})
    found = text_to_score(run.cfg, given, tokenizer, vars(run.recorded))
    assert all_text(found) == b"A Text" and "1 of 1 scored documents (6 of 6 bytes)" in found.notes[-1]


@pytest.fixture
def lines(config, tmp_path, monkeypatch):
    """A run on x/a.jsonl and x/b.jsonl, of which it holds out x/rest.jsonl."""
    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for name, numbers in (("a", range(200)), ("b", range(200, 400)), ("rest", range(400, 440))):
        write_lines(tmp_path / f"x/{name}.jsonl", numbers)
    cfg = config(data="jsonl", train_files=["x/a.jsonl", "x/b.jsonl"], val_files="x/rest.jsonl")
    return SimpleNamespace(cfg=cfg, recorded=load_dataset(cfg))


def write_lines(path: Path, numbers) -> None:
    path.write_text("".join(json.dumps({"text": f"line {n} of the book"}) + "\n" for n in numbers))


def test_files_of_json_lines_are_scored_whole_but_for_the_run_s_own(lines, tmp_path) -> None:
    asked = {"train_files": None, "val_files": None, "data_root": None}
    write_lines(tmp_path / "new.jsonl", range(900, 903))
    new = scored(lines, input_file="new.jsonl", **asked)
    assert new.whole and str(new) == "all of new.jsonl" and new.overlap.share == 0
    assert not any("held out" in note for note in new.notes)
    assert all_text(new) == b"".join(b"line %d of the book" % n for n in range(900, 903))
    part = scored(lines, input_file="x/a.jsonl", **asked)
    assert part.whole and part.overlap.share == 1
    assert any("100.0% of this text also stands in the training text" in note for note in part.notes)
    own = all_text(scored(lines))
    assert own == b"".join(b"line %d of the book" % n for n in range(400, 440))
    for given in (
        {**asked, "input_file": "x"},
        {"train_files": lines.cfg.train_files},
    ):
        found = scored(lines, **given)
        assert not found.whole and all_text(found) == own


def test_a_copy_of_the_run_s_json_lines_is_not_scored_whole(lines, config, tmp_path) -> None:
    cfg = config(data="jsonl", train_files="x/a.jsonl")
    run = SimpleNamespace(cfg=cfg, recorded=load_dataset(cfg))
    shutil.copy(tmp_path / "x/a.jsonl", tmp_path / "copy.jsonl")
    found = scored(run, train_files=None, input_file="copy.jsonl")
    assert not found.whole and all_text(found) == all_text(scored(run))
