"""Killed, or out of room, between any two changes to the files of a run: it goes on, or says what is wrong."""

import builtins
import errno
import itertools
import json
import os
import re
import shutil

import pytest
import torch

from tests.contract.tiny import config
from trainer.errors import TrainingError
from trainer.loop import train
from trainer.run import files, folder
from trainer.run.checkpoint import checkpoints_in, damage, load_json, load_tensors
from trainer.run.folder import RunFolder

# What changes a file system. Everything that Python writes, links, renames or deletes goes through one of these.
CALLS = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync")
WORDS = ["num_iterations=3", "val_loss_every=1", "save_steps=1", "save_best_model=true", "save_total_limit=1"]


class Killed(BaseException):
    """The process is no more: nothing catches this, and no clean-up after it does anything."""


class Faults:
    """Counts the calls that change files and hands the one with number `at` to `fail`; None lets all pass."""

    def __init__(self, patch, fail, at=None):
        self.done, self.fail, self.at = 0, fail, at
        for name in CALLS:
            patch.setattr(os, name, self._around(getattr(os, name)))
        patch.setattr(
            builtins, "open", self._around(builtins.open, lambda path, mode="r", *_, **__: mode[0] in "wa")
        )

    def _around(self, call, counts=lambda *_, **__: True):
        def wrapped(*args, **kwargs):
            if counts(*args, **kwargs):
                self.done += 1
                if self.at is not None:
                    self.fail(self)
            return call(*args, **kwargs)

        return wrapped


def killed(faults):
    if faults.done >= faults.at:  # and all that a clean-up would do after it
        raise Killed


def full(faults):
    if faults.done == faults.at:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(faults):
    if faults.done >= faults.at:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


# -- one save ------------------------------------------------------------------------------------------------


def save(run, step):
    state = {"training_state.json": json.dumps({"step": step, "progress": {"step": step}})}
    run.save(step, {"model.pt": {"w": torch.full((3,), float(step))}}, state, best=True, keep=1)


@pytest.fixture
def saved(tmp_path):
    """A run folder with one save, and its best model."""
    save(RunFolder(tmp_path / "saved"), 1)
    return tmp_path / "saved"


def attempt(action):
    """The message of the failure that the faults made of it, "" for a kill, None where it succeeded all the same."""
    try:
        action()
    except Killed:
        return ""
    except TrainingError as error:
        return str(error)
    return None


def locked(path):
    run = RunFolder(path)
    run.lock()
    return run


def assert_sound(path):
    """A checkpoint to go on with; links to whole files; nothing left of a dead save."""
    newest = checkpoints_in(path)[-1]
    assert all(damage(checkpoint) is None for checkpoint in checkpoints_in(path))
    assert damage(path / "best_model") is None
    step = load_json(newest, "training_state.json")["step"]
    assert load_tensors(newest, "model.pt")["w"][0] == step
    assert load_tensors(path, "model.pt")["w"][0] in (step - 1, step)
    assert not [p.name for p in path.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    return step


def cuts(saved, fail):
    """(number of the call that failed, a copy of the run folder after a save that failed there, what was said)"""
    whole = shutil.copytree(saved, saved.with_name("counted"))
    with pytest.MonkeyPatch.context() as patch:
        counted = Faults(patch, fail)
        save(RunFolder(whole), 2)
    assert counted.done > 20
    for at in range(1, counted.done + 1):
        path = shutil.copytree(saved, saved.with_name(f"run-{at}"))
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, fail, at)
            said = attempt(lambda path=path: save(RunFolder(path), 2))
        yield at, path, said


def test_a_save_killed_anywhere(saved, monkeypatch):
    monkeypatch.setattr(folder, "cannot_go_on_from", damage)  # these hold nothing that a run could go on with
    found = set()
    for at, path, said in cuts(saved, killed):
        assert said == ""
        run = locked(path)
        step = assert_sound(path)
        assert run.have_best(step, path / f"checkpoint-{step}")
        assert load_json(path / "best_model", "training_state.json")["step"] == step
        if at % 4 == 0:
            save(run, 3)
            assert assert_sound(path) == 3 and [c.name for c in checkpoints_in(path)] == ["checkpoint-3"]
        run.unlock(failed=False)
        found.add(step)
    assert found == {1, 2}, "before the rename and behind it"


@pytest.mark.parametrize(("fail", "why"), [(full, "the disk is full"), (read_only, "Read-only file system")])
def test_a_save_without_room_anywhere(saved, fail, why):
    for _, path, said in cuts(saved, fail):
        if said is None:  # a link that could not be made is a copy
            assert fail is full and checkpoints_in(path)[-1].name == "checkpoint-2"
        else:
            assert re.search(
                f"could not write .*{why}.*The last complete checkpoint is .*checkpoint-[12]", said
            )
        run = locked(path)
        assert_sound(path)
        run.unlock(failed=False)


# -- the small files -----------------------------------------------------------------------------------------

SMALL = {  # everything but checkpoints that is written into a run folder
    "summary": lambda run: run.write_json("summary.json", {"steps": 2}),
    "sample": lambda run: run.add_sample(3, "text"),
    "dropped": lambda run: run.drop_later(1, scored=True),
}


def folder_with_files(path):
    path.mkdir()
    run = RunFolder(path)
    run.write_json("summary.json", {"steps": 1})
    for step in (1, 2):
        run.add_sample(step, "text")
        files.append(path / "metrics.jsonl", f'{{"step": {step}}}\n')
    return run


@pytest.mark.parametrize("what", SMALL)
@pytest.mark.parametrize("fail", [killed, full, read_only])
def test_a_small_file_is_the_old_or_the_new_one(tmp_path, what, fail):
    run = folder_with_files(tmp_path / "counted")
    with pytest.MonkeyPatch.context() as patch:
        counted = Faults(patch, fail)
        SMALL[what](run)
    assert counted.done
    for at in range(1, counted.done + 1):
        run = folder_with_files(tmp_path / f"run-{at}")
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, fail, at)
            said = attempt(lambda run=run: SMALL[what](run))
        assert said == "" if fail is killed else said is None or "could not write" in said
        run = locked(run.path)
        assert run.read_json("summary.json")["steps"] in (1, 2)
        run.drop_later(1, scored=True)
        assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n'
        assert '{"step": 2}\n' in (run.path / "metrics.dropped.jsonl").read_text(), "nothing is lost"
        assert "--- step 2 ---\ntext\n" in (run.path / "samples.dropped.txt").read_text()
        run.unlock(failed=False)


# -- a whole run ---------------------------------------------------------------------------------------------


def results(path):
    """What must not depend on how often a run was killed."""
    summary = json.loads((path / "summary.json").read_text())
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "eta_seconds")
    return {
        "best": summary["best"],
        "score": summary["score"],
        "lines": [{k: v for k, v in line.items() if k not in timed} for line in lines],
        "weights": {k: v.tolist() for k, v in load_tensors(path / "final_model", "model.pt").items()},
        "best weights": {k: v.tolist() for k, v in load_tensors(path / "best_model", "model.pt").items()},
        "samples": (path / "samples.txt").read_text(),
    }


def run(path, *more):
    return train(*config("gpt2", *WORDS, *more), path)


@pytest.mark.slow
@pytest.mark.parametrize("fail", [killed, full])
def test_a_run_cut_short_anywhere_ends_as_if_it_were_not(tmp_path, fail):
    run(tmp_path / "whole")
    expected = results(tmp_path / "whole")
    for at in itertools.count(1, 11):
        path = tmp_path / f"cut-{at}"
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, fail, at)
            said = attempt(lambda path=path: run(path))
        if faults.done < at:  # the run has no more changes
            break
        # None: what had no room can be done without, or otherwise.
        assert said == "" if fail is killed else said is None or re.search("disk is full|No space left", said)
        cfg, model_cfg = config("gpt2", *WORDS)
        train(cfg.model_copy(update={"resume": "auto", "output_dir": str(path)}), model_cfg, path)
        assert results(path) == expected, f"cut short at change {at}"
        shutil.rmtree(path)
    assert at > 100
