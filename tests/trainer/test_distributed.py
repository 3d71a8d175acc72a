"""Which device a process takes, and who hears of it where it cannot."""

from __future__ import annotations

import datetime
import io
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import TCPStore

from tests.contract.pair import Pair
from tests.trainer.one_of_two import choose_where
from trainer.commands import launch
from trainer.distributed import World, _local_rank, choose_device
from trainer.errors import TrainingError
from trainer.session import require_same_text


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def second_of_four(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return monkeypatch


def test_more_processes_than_gpus(two_gpus):
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(
        ValueError, match=r"cuda:2 does not exist; CUDA devices that are visible: 2\. .*num_gpus"
    ):
        choose_device("cuda", 2)


def test_hidden_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "none")
    with pytest.raises(ValueError, match=r"no CUDA device is visible \(CUDA_VISIBLE_DEVICES='none'\)"):
        choose_device("cuda")


def test_a_leftover_local_rank_is_nobodys(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert _local_rank("cuda") == 0


def test_processes_do_not_share_a_gpu_by_accident(second_of_four):
    assert _local_rank("cpu") == 1
    with pytest.raises(ValueError, match=r"LOCAL_RANK=''.* process 1 of 4 .*SLURM_LOCALID"):
        _local_rank("cuda")
    second_of_four.setenv("LOCAL_RANK", "3")
    assert _local_rank("cuda") == 3


@pytest.mark.slow
def test_what_one_process_lacks_all_of_them_refuse():
    with Pair() as pair:
        first, second = pair.ask(choose_where, 1)
        assert first == second == "process 1 has no such device"


def test_a_port_that_another_run_holds(second_of_four):
    taken = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    second_of_four.setenv("RANK", "0")
    second_of_four.setenv("MASTER_PORT", str(taken.port))
    with pytest.raises(
        TrainingError, match=rf"at 127.0.0.1:{taken.port} in vain: .*in use.*unset RANK WORLD_SIZE"
    ):
        launch._meet(minutes=0.1)


def test_who_is_waited_for_is_said(second_of_four, monkeypatch):
    said = threading.Event()

    class Console(io.StringIO):
        def write(self, text: str) -> int:
            said.set()
            return super().write(text)

    def meet_once_told(*args, **kwargs):
        assert said.wait(60)
        return rendezvous(*args, **kwargs)

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    second_of_four.setenv("MASTER_PORT", str(store.port))
    second_of_four.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    rendezvous = torch.distributed.rendezvous
    monkeypatch.setattr(torch.distributed, "rendezvous", meet_once_told)
    monkeypatch.setattr(sys, "stderr", Console())
    met = launch._meet(patience=0.0)
    met.set("x", "1")
    assert "note: process 1 of 4 waits for the others at 127.0.0.1" in sys.stderr.getvalue()
    store.wait(["x"], datetime.timedelta(seconds=5))


@pytest.mark.parametrize("of_main", ["a", "b"])
def test_processes_that_read_other_text_are_refused(of_main):
    world = SimpleNamespace(broadcast=lambda value: of_main, agree=bool)
    dataset = SimpleNamespace(fingerprint="a")
    with nullcontext() if of_main == "a" else pytest.raises(ValueError, match="do not read the same text"):
        require_same_text(world, dataset)


def test_a_score_of_ones_own_is_not_dealt_out(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    world = World(torch.device("cpu"), alone=True)
    assert (world.rank, world.size) == (0, 1) and not world.agree(False) and world.add_up([1.5]) == [1.5]
