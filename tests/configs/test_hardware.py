"""What a launcher's environment says, and what a shell has left over of one."""

from __future__ import annotations

import pytest

from configs.hardware import process_group, require_meeting_place, world_size
from configs.messages import ConfigError


@pytest.fixture
def environment(monkeypatch):
    def to(**values):
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return to


@pytest.mark.parametrize(
    ("values", "group"),
    [
        ({}, (0, 1)),
        ({"RANK": "3"}, (0, 1)),  # half a launcher's is none's
        ({"WORLD_SIZE": "3"}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
    ],
)
def test_who_this_process_is(environment, values, group):
    environment(**values)
    assert process_group() == group
    assert world_size("auto", "cpu") == group[1]


@pytest.mark.parametrize("rank_and_size", [("4", "4"), ("-1", "4"), ("0", "four"), ("", "4"), ("0", "0")])
def test_what_cannot_be(environment, rank_and_size):
    rank, size = rank_and_size
    environment(RANK=rank, WORLD_SIZE=size)
    with pytest.raises(
        ConfigError, match=rf"RANK={rank} WORLD_SIZE={size}: .*unset RANK WORLD_SIZE.*torchrun"
    ):
        process_group()


def test_processes_that_cannot_meet(environment):
    environment(RANK="0", WORLD_SIZE="4", MASTER_ADDR="127.0.0.1")
    with pytest.raises(
        ConfigError, match=r"one of 4 processes, and without MASTER_PORT .*unset RANK WORLD_SIZE"
    ):
        require_meeting_place()
    environment(RANK="0", WORLD_SIZE="1")
    require_meeting_place()
    environment(RANK="0", WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    require_meeting_place()
