"""Names of what is not whole yet, and what becomes of them."""

import os
import shutil
from pathlib import Path

import pytest

from tests.trainer.run.test_checkpoint import save
from trainer.errors import TrainingError
from trainer.run import checkpoint as ck
from trainer.run import files
from trainer.run.folder import RunFolder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_save_after_one_that_was_killed_in_a_process_of_the_same_number(tmp_path):
    """As in a container, where every process is number 1."""
    (tmp_path / f".checkpoint-3.{os.getpid()}.tmp").mkdir()
    (tmp_path / f".best_model.{os.getpid()}.tmp").mkdir()
    ck.link_folder(save(tmp_path, 3), tmp_path / "best_model")
    assert ck.damage(tmp_path / "best_model") is None


def test_no_two_names_are_alike_and_none_is_too_long(tmp_path):
    path = tmp_path / ("é" * 120 + ".json")
    assert len({files.beside(path) for _ in range(100)}) == 100
    files.write_atomically(path, "whole")
    assert path.read_text() == "whole" and names(tmp_path) == {path.name}


def test_the_lock_clears_what_dead_saves_left_and_nothing_else(tmp_path):
    ours = [
        ".checkpoint-5.1.tmp",
        ".model.pt.77.tmp",
        ".checkpoint-6.0123456789abcdef.tmp",
        ".best_model.9.old",
    ]
    theirs = [".notes.tmp", ".notes.1.old", ".tmp", "a.1.tmp", ".x.1.swp", ".lock", "best_model"]
    for name in [*ours, *theirs]:
        (tmp_path / name).mkdir() if "model" in name else (tmp_path / name).touch()
    folder = RunFolder(tmp_path)
    folder.lock()
    folder.unlock(failed=False)
    assert names(tmp_path) == set(theirs)


def test_what_another_run_is_writing_is_left_alone(tmp_path):
    holder = RunFolder(tmp_path)
    holder.lock()
    (tmp_path / ".checkpoint-6.0123456789abcdef.tmp").mkdir()
    with pytest.raises(TrainingError, match="another run is writing"):
        RunFolder(tmp_path).lock()
    assert ".checkpoint-6.0123456789abcdef.tmp" in names(tmp_path)
    holder.unlock(failed=False)


def test_a_folder_that_was_retired_and_not_replaced_comes_back(tmp_path):
    ck.link_folder(save(tmp_path, 1), tmp_path / "best_model")
    os.rename(tmp_path / "best_model", files.beside(tmp_path / "best_model", files.RETIRED))
    shutil.copytree(save(tmp_path, 2), files.beside(tmp_path / "best_model"))
    files.settle_leftovers(tmp_path)
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", "best_model"}
    assert os.path.samefile(tmp_path / "best_model/model.pt", tmp_path / "checkpoint-1/model.pt")


def test_a_checkpoint_is_gone_at_once(tmp_path, monkeypatch):
    """Killed while it is deleted, no half of it is there."""
    for step in (1, 2):
        save(tmp_path, step)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        ck.prune(tmp_path, 1, tmp_path / "checkpoint-2", pytest.fail)
    assert [p.name for p in ck.checkpoints_in(tmp_path)] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (28, r"the disk is full \(.* MB free\)"),
        (122, r"the disk is full \(.* MB free\)"),  # a quota
        (30, "Read-only file system"),
    ],
)
def test_a_failed_write_says_why_and_what_is_safe(tmp_path, number, said):
    error = files.could_not_write(tmp_path / "x.json", OSError(number, os.strerror(number)))
    remedy = "Free some space" if "full" in said else "Mend that"
    assert str(error).startswith(f"could not write {tmp_path}/x.json: ")
    with pytest.raises(TrainingError, match=f"{said}. {remedy} and try again"):
        raise error
    (tmp_path / "manifest.json").touch()
    assert f"No checkpoint had been saved before. {remedy} and start again" in str(
        files.could_not_write(tmp_path / "x.json", OSError(number, os.strerror(number)))
    )
    save(tmp_path, 4)
    assert f"The last complete checkpoint is {tmp_path}/checkpoint-4. {remedy} and resume" in str(
        files.could_not_write(tmp_path / "x.json", OSError(number, os.strerror(number)))
    )
