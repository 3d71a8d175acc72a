"""Which files of a folder are text, and that nothing is left out in silence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data import files
from data.errors import DataError
from data.files import existing_path, find_text


def place(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text\n")


def test_runs_are_left_out_and_said(tmp_path) -> None:
    place(tmp_path, "a.txt", "sub/outputs/b.txt")
    place(tmp_path, "outputs/x/report.html", "checkpoints/y/samples.txt", "multirun/z/config.yaml")
    place(tmp_path, "mine/config.yaml", "mine/metrics.jsonl", "mine/samples.txt", "mine/deep/log.txt")
    place(tmp_path, "kept/checkpoint-3/training_state.json", "kept/checkpoint-3/a.txt", "sweep/multirun.yaml")
    found, notes = find_text(tmp_path)
    assert found == ["a.txt", "sub/outputs/b.txt"]  # which is nobody's run
    (note,) = notes
    assert note.startswith("left out (folders of runs): checkpoints, mine, multirun and 3 more")


def test_a_folder_that_is_itself_a_run_gives_its_other_text(tmp_path) -> None:
    place(tmp_path, "a.txt", "config.yaml", "manifest.json", "samples.txt", "report.html")
    found, notes = find_text(tmp_path)
    assert found == ["a.txt"]
    assert "left out (files of a run): config.yaml, report.html, samples.txt" in notes
    os.remove(tmp_path / "manifest.json")
    assert find_text(tmp_path)[0] == ["a.txt", "config.yaml", "report.html", "samples.txt"]


def test_links_pipes_and_hidden_files_are_said(tmp_path) -> None:
    place(tmp_path, "a.txt", ".secret.txt", ".git/x.txt", "sub/b.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "again.txt").symlink_to("a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    found, notes = find_text(tmp_path)
    assert found == ["a.txt", "again.txt", "sub/b.txt"]
    assert sorted(notes) == [
        "left out (hidden): .git, .secret.txt",
        "left out (links to folders, which are not followed): loop",
        "left out (links to nothing, pipes and devices): gone.txt, pipe.txt",
    ]


def test_the_file_that_the_run_prints_to_is_no_text(tmp_path, monkeypatch) -> None:
    place(tmp_path, "a.txt", "train.log")
    status = os.stat(tmp_path / "train.log")
    monkeypatch.setattr(files.os, "fstat", lambda stream: status)
    assert find_text(tmp_path) == (["a.txt"], ["left out (printed to by this very command): train.log"])


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch) -> None:
    def walk(root, onerror):
        onerror(PermissionError(13, "Permission denied", "secret"))

    monkeypatch.setattr(files.os, "walk", walk)
    with pytest.raises(DataError, match="'secret' cannot be read: Permission denied"):
        find_text(tmp_path)


def test_names_that_are_no_utf_8_can_be_printed(tmp_path) -> None:
    for number in range(2):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/.caf\xe9%d.txt" % number)).write_text("text")
    (note,) = find_text(tmp_path)[1]
    assert note.encode("utf-8") == rb"left out (hidden): .caf\udce90.txt, .caf\udce91.txt"


def test_paths_that_cannot_be_looked_up_or_lead_nowhere(tmp_path, monkeypatch) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(DataError, match="input_file .*a' is a link that leads nowhere"):
        existing_path("input_file", tmp_path / "a")

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(DataError, match="val_files 'x' cannot be looked up: Permission denied"):
        existing_path("val_files", Path("x"))
