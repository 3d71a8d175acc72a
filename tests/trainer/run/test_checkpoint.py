import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch

from trainer.errors import TrainingError
from trainer.run import checkpoint as ck
from trainer.run import files


def save(run: Path, step: int, value: float = 1.0) -> Path:
    return ck.save_checkpoint(
        run, step, {"model.pt": {"w": torch.full((3,), value)}}, {"training_state.json": "{}"}
    )


def test_round_trip_and_digests(tmp_path):
    saved = save(tmp_path, 7, 2.5)
    assert saved.name == "checkpoint-7"
    assert ck.damage(saved) is None
    assert torch.equal(ck.load_tensors(saved, "model.pt")["w"], torch.full((3,), 2.5))
    assert not list(tmp_path.glob(".*")), "no temporary files are left"


def test_newest_is_by_number_not_by_name_or_time(tmp_path):
    save(tmp_path, 1000)
    save(tmp_path, 999)
    assert [p.name for p in ck.checkpoints_in(tmp_path)] == ["checkpoint-999", "checkpoint-1000"]
    assert ck.newest_checkpoint(tmp_path, pytest.fail).name == "checkpoint-1000"


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "no_digests"])
def test_damaged_newest_is_named_and_the_one_before_used(tmp_path, harm):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    target = newest / ("digests.json" if harm == "no_digests" else "model.pt")
    if harm == "flip":
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
    elif harm == "truncate":
        target.write_bytes(target.read_bytes()[:-1])
    else:
        target.unlink()
    warnings = []
    assert ck.newest_checkpoint(tmp_path, warnings.append).name == "checkpoint-1"
    assert len(warnings) == 1 and "checkpoint-2" in warnings[0] and target.name in warnings[0]


def test_unfinished_temporary_folder_is_not_a_checkpoint(tmp_path):
    (tmp_path / ".checkpoint-5.1.tmp").mkdir()
    (tmp_path / "checkpoint-abc").mkdir()
    assert ck.newest_checkpoint(tmp_path, pytest.fail) is None


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    (save(tmp_path, 3) / "model.pt").write_bytes(b"x")
    again = save(tmp_path, 3, 4.0)
    assert ck.damage(again) is None and ck.load_tensors(again, "model.pt")["w"][0] == 4.0


def test_failed_write_leaves_nothing_and_names_what_is_kept(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ck.os, "fsync", full)
    with pytest.raises(TrainingError, match="disk is full.*checkpoint-1"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_real_write_error_midway_through_torch_save(tmp_path):
    """The operating system refuses to write on (file size limit), in the middle of a large tensor file."""
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match="could not write .*checkpoint-1"):
            ck.save_checkpoint(tmp_path, 2, {"model.pt": torch.zeros(10**6)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_prune_keeps_the_newest_and_never_the_links(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    ck.link_folder(tmp_path / "checkpoint-1", tmp_path / "best_model")
    newest = tmp_path / "checkpoint-10"
    ck.prune(tmp_path, 2, newest, lambda path: ck.damage(path) is None)
    assert [p.name for p in ck.checkpoints_in(tmp_path)] == ["checkpoint-3", "checkpoint-10"]
    assert ck.damage(tmp_path / "best_model") is None, "hard links outlive the checkpoint they came from"
    ck.prune(tmp_path, None, newest, pytest.fail)
    assert len(ck.checkpoints_in(tmp_path)) == 2


def test_links_follow_the_newest(tmp_path):
    for step, value in ((1, 1.0), (2, 2.0)):
        saved = save(tmp_path, step, value)
        ck.link_folder(saved, tmp_path / "final_model")
        ck.link_files(saved, tmp_path)
        assert torch.load(tmp_path / "model.pt")["w"][0] == value
        assert ck.load_tensors(tmp_path / "final_model", "model.pt")["w"][0] == value
    assert (tmp_path / "model.pt").stat().st_ino == (tmp_path / "checkpoint-2" / "model.pt").stat().st_ino


def test_find_checkpoint_by_run_folder_checkpoint_and_link(tmp_path):
    saved = save(tmp_path, 1)
    newest = save(tmp_path, 2)
    ck.link_folder(saved, tmp_path / "best_model")
    assert ck.find_checkpoint(tmp_path, pytest.fail) == newest
    assert ck.find_checkpoint(saved, pytest.fail) == saved
    assert ck.find_checkpoint(tmp_path / "best_model", pytest.fail) == tmp_path / "best_model"
    with pytest.raises(ValueError, match="no such.*checkpoint-1"):
        ck.find_checkpoint(tmp_path / "checkpoint-9", pytest.fail)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        ck.find_checkpoint(tmp_path / "empty", pytest.fail)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    saved = ck.save_checkpoint(tmp_path, 1, {"model.pt": {"w": Evil()}}, {})
    with pytest.raises(Exception, match="(?i)weights"):
        ck.load_tensors(saved, "model.pt")
    assert not (tmp_path / "executed").exists()


def test_atomic_text(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(TrainingError, match="could not write.*summary.json: no. Mend that and try again"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_damaged_ones_are_not_counted_when_the_oldest_go(tmp_path):
    for step in (1, 2, 3, 9):
        save(tmp_path, step)
    for step in (2, 9):  # the second from beyond, where a run that went on from 1 has not come by yet
        (tmp_path / f"checkpoint-{step}" / "model.pt").write_bytes(b"x")
    ck.prune(tmp_path, 2, tmp_path / "checkpoint-3", lambda path: ck.damage(path) is None)
    assert [p.name for p in ck.checkpoints_in(tmp_path)] == ["checkpoint-1", "checkpoint-3", "checkpoint-9"]


def test_a_state_that_has_changed_replaces_what_was_saved(tmp_path, monkeypatch):
    def at(evaluated, value):
        state = json.dumps({"progress": {"evaluated_at": evaluated}})
        return ck.save_checkpoint(tmp_path, 3, {"model.pt": {"w": torch.tensor(value)}}, {ck.STATE: state})

    at(-1, 1.0)
    assert ck.load_tensors(at(-1, 2.0), "model.pt")["w"] == 1.0, "the same again is not written"
    assert ck.load_tensors(at(3, 3.0), "model.pt")["w"] == 3.0
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(TrainingError, match="Input/output error"):
        at(4, 4.0)
    assert ck.damage(tmp_path / "checkpoint-3") is None, "the old one is back"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


DIGESTS = {
    "[]": "no JSON object",
    "null": "no JSON object",
    "{}": "does not name model.pt",
    "[[1, 2]]": "no JSON object",
    '{"model.pt": 1, "training_state.json": 2}': "model.pt does not match",
    "[" * 100_000: "missing or unreadable",
    "\x00": "missing or unreadable",
}
NAMES = ["/dev/zero", "../x", "..", "", "a/b", "x\x00y"]


def test_digests_that_say_nothing_or_name_other_files_are_damage(tmp_path):
    saved = save(tmp_path, 1)
    whole = json.loads((saved / ck.DIGESTS).read_text())
    for text, said in DIGESTS.items():
        (saved / ck.DIGESTS).write_text(text)
        assert said in ck.damage(saved)
    for name in NAMES:
        (saved / ck.DIGESTS).write_text(json.dumps(whole | {name: "0"}))
        assert ck.damage(saved)


def in_place_of(path, make):
    path.unlink(missing_ok=True)
    make(path)


@pytest.mark.parametrize("name", ["model.pt", "digests.json", "more.pt"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "is no file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a link that leaves the folder"),
        (lambda path: path.symlink_to("../checkpoint-1/model.pt"), "is a link that leaves the folder"),
        (lambda path: path.symlink_to("nothing"), "is a link that leads nowhere"),
        (lambda path: path.symlink_to(path.name), "is a link that leads nowhere"),
    ],
)
def test_what_is_no_file_of_a_checkpoint_is_named_and_not_opened(tmp_path, name, make, said):
    save(tmp_path, 1)
    in_place_of(save(tmp_path, 2) / name, make)
    warnings = []
    assert ck.newest_checkpoint(tmp_path, warnings.append).name == "checkpoint-1"
    assert "checkpoint-2 is damaged" in warnings[0] and said in warnings[0]


def test_folders_may_lie_behind_links(tmp_path):
    save(tmp_path / "disk", 1)
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoint-1").symlink_to(tmp_path / "disk/checkpoint-1")
    for run in ("run", "other"):
        assert ck.newest_checkpoint(tmp_path / run, pytest.fail).name == "checkpoint-1"


@pytest.mark.parametrize(
    ("state", "said"), [("[]", "no JSON object"), ("{", "no JSON"), ('{"format": 99}', "has format 99, and")]
)
def test_a_state_that_says_what_it_cannot(tmp_path, state, said):
    save(tmp_path, 1)
    newest = ck.save_checkpoint(tmp_path, 2, {"model.pt": {}}, {ck.STATE: "{}"})
    digest = ck.write_file(newest / ck.STATE, state.encode())
    whole = json.loads((newest / ck.DIGESTS).read_text())
    (newest / ck.DIGESTS).write_text(json.dumps(whole | {ck.STATE: digest}))
    warnings = []
    assert ck.newest_checkpoint(tmp_path, warnings.append).name == "checkpoint-1"
    assert said in warnings[0]


def test_the_top_of_a_run_folder_keeps_no_older_file(tmp_path):
    first = ck.save_checkpoint(tmp_path, 1, {"model.pt": {}, "ema.pt": {}}, {ck.STATE: "{}"})
    ck.link_files(first, tmp_path)
    ck.link_files(save(tmp_path, 2), tmp_path)
    assert not (tmp_path / "ema.pt").exists() and (tmp_path / "model.pt").exists()
