"""What the campaign of folders does to a folder, and what it takes for a loss."""

import json
import os
import random

import pytest
import torch

from tests.campaign import folders
from tests.campaign.command import CLEAN, OK, Said
from trainer.run.checkpoint import checkpoints_in, damage, save_checkpoint

STATE = {"format": 1, "step": 6}


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole"
    path.mkdir()
    for step in (4, 6):
        tensors = {"model.pt": {"model": {"w": torch.ones(2, 3) * step}}}
        save_checkpoint(path, step, tensors, {"training_state.json": json.dumps(STATE), "config.json": "{}"})
    os.link(path / "checkpoint-6/model.pt", path / "model.pt")
    (path / "metrics.jsonl").write_text('{"val_bits_per_byte": 2.5}\n')
    return path


def test_a_copy_shares_what_the_folder_does_and_nothing_with_it(whole, tmp_path):
    copy = folders._copied(whole, tmp_path / "run")
    assert (copy / "model.pt").samefile(copy / "checkpoint-6/model.pt")
    assert not (copy / "model.pt").samefile(whole / "model.pt")
    assert all(damage(checkpoint) is None for checkpoint in checkpoints_in(copy))


@pytest.mark.parametrize("kind", sorted({*folders.ACCIDENTS} - {"text changed", "cut", "garbage"}))
def test_an_accident_is_seen_by_the_digests(kind, whole, tmp_path):
    copy = folders._copied(whole, tmp_path / "run")
    folders.ACCIDENTS[kind](random.Random(1), copy / "checkpoint-6/model.pt")
    assert damage(copy / "checkpoint-6") is not None
    assert damage(copy / "checkpoint-4") is None
    assert damage(whole / "checkpoint-6") is None


@pytest.mark.parametrize("kind", folders.FORGERIES)
@pytest.mark.parametrize("name", ["model.pt", "config.json"])
def test_a_forgery_is_not(kind, name, whole, tmp_path):
    before = (whole / "checkpoint-6" / name).read_bytes()
    content = folders.FORGERIES[kind](random.Random(2), whole / "checkpoint-6" / name)
    assert kind == "forged: a value" or content != before
    copy = folders._copied(whole, tmp_path / "run")
    folders._forge(copy / "checkpoint-6", name, content)
    assert damage(copy / "checkpoint-6") is None
    assert (copy / "checkpoint-6" / name).read_bytes() == content


def test_what_is_lost_or_not_said_is_bad(whole, tmp_path):
    path = folders._copied(whole, tmp_path / "resume/run")
    inner = (path / "checkpoint-6/model.pt").relative_to(path)
    folders.ACCIDENTS["zeros"](random.Random(3), path / inner)
    told = Said(0, "", "checkpoint-6 is damaged: model.pt does not match its digest")

    def found(name, said, outcome=OK):
        return folders._after_an_accident(name, said, path, inner, whole, outcome)[0]

    assert found("resume", Said(0, "", "")) == folders.SILENT
    assert found("resume", Said(1, "", "error: no"), CLEAN) == folders.LOST, "checkpoint-4 is sound"
    assert found("resume", told) == folders.LOST, "the weights are still zeros"
    (path / inner).write_bytes((whole / inner).read_bytes())
    assert found("resume", told) == OK
    for score, outcome in ((2.5, OK), (2.4, folders.LOST)):
        (tmp_path / "resume/eval.json").write_text(json.dumps({"score": {"bits_per_byte": score}}))
        assert found("eval", told) == outcome
