"""Failures of the machine, said for people."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from tests.contract.tiny import config
from trainer import loop
from trainer.commands import launch
from trainer.errors import TrainingError, of_the_machine
from trainer.memory import NoRoom


def raised(function):
    with pytest.raises(BaseException) as caught:
        function()
    return caught.value


def wrapped(cause):
    try:
        raise cause
    except type(cause) as error:
        raise RuntimeError("while scoring") from error


def test_too_little_memory():
    refused = raised(lambda: torch.empty(10**15))
    assert type(refused) is RuntimeError
    for error in (
        refused,
        MemoryError(),
        torch.OutOfMemoryError("CUDA"),
        NoRoom("CUDA"),
        raised(lambda: wrapped(refused)),
    ):
        assert of_the_machine(error).startswith("out of memory (")
        assert "smaller batch_size" in of_the_machine(error)


def test_no_compiler():
    error = raised(lambda: wrapped(InvalidCxxCompiler()))
    assert (
        "torch_compile: the model could not be compiled (InvalidCxxCompiler: No working C++"
        in of_the_machine(error)
    )
    assert of_the_machine(error).endswith("Set torch_compile=false")


@pytest.mark.parametrize("error", [ValueError("DefaultCPU"), RuntimeError("a fault of ours"), KeyError("x")])
def test_others_are_left_alone(error):
    assert of_the_machine(error) == ""


def test_what_was_suppressed_is_no_cause():
    def suppressed():
        try:
            raise MemoryError
        except MemoryError:
            raise ValueError("what this means") from None

    assert of_the_machine(raised(suppressed)) == ""


def test_a_run_that_does_not_fit_ends_in_one_message(tmp_path, capsys):
    cfg, model_cfg = config("gpt2", "model_cfg.n_ctx=1000000000000")
    with pytest.raises(launch.JobFailed) as failed:
        launch.run_here(cfg, model_cfg, tmp_path / "run", None)
    assert isinstance(failed.value.error, TrainingError)
    status, said = failed.value.say(), capsys.readouterr().err
    assert status == 1 and said.startswith("error: out of memory (RuntimeError: ")
    assert "256000000000000 bytes" in said and said.count("\n") == 1


def test_every_process_says_what_only_it_can_know(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for error, status, said in ((MemoryError("1 GB"), 1, "MemoryError: 1 GB"), (ValueError("seed"), 2, "")):
        monkeypatch.setattr(loop, "train", mock.Mock(side_effect=error))
        with pytest.raises(launch.JobFailed) as failed:
            launch.run_here(*config("gpt2"), tmp_path, None)
        assert failed.value.say() == status
        told = capsys.readouterr().err
        assert said in told if said else not told
