"""GPUs that jobs side by side share out."""

from __future__ import annotations

import os
import threading

import pytest

from trainer.errors import TrainingError
from trainer.sweep import gpus


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "cuda_device_count", lambda: 2)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(gpus, "PAUSE", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")


def as_another_process() -> None:
    """Jobs are processes: none sees what another set."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "4,7"


def test_each_has_its_own_and_what_was_set_comes_back():
    with gpus.own_gpus(1) as first:
        as_another_process()
        with gpus.own_gpus(1) as second:
            assert (first, second, os.environ["CUDA_VISIBLE_DEVICES"]) == (["4"], ["7"], "7")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"


def test_one_that_asks_for_more_waits_until_they_are_free():
    got: list = []

    def job() -> None:
        with gpus.own_gpus(2) as mine:
            got.append(mine)

    with gpus.own_gpus(1):
        as_another_process()
        thread = threading.Thread(target=job)
        thread.start()
        thread.join(0.1)
        assert not got
    thread.join(10)
    assert got == [["4", "7"]]


def test_more_than_there_are_is_said_and_none_changes_nothing(monkeypatch):
    with pytest.raises(TrainingError, match="num_gpus is 3, and this machine shows 2"), gpus.own_gpus(3):
        pass
    with gpus.own_gpus(0) as mine:
        assert (mine, os.environ["CUDA_VISIBLE_DEVICES"]) == ([], "4,7")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with gpus.own_gpus(1) as mine:
        assert mine == ["0"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
