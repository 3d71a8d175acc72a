"""Every architecture, tiny, through one contract. Being in the table enrols it; `--architecture` names others."""

from pathlib import Path

import pytest
import torch

from models import ARCHITECTURES
from tests.contract import tiny
from tests.contract.pair import Pair
from tests.contract.tiny import HARD, SHORT, TYPES, config, golden, golden_file, with_dropout
from trainer.loop import train


def pytest_runtest_setup(item):
    only = item.get_closest_marker("on_cpu")
    if only and tiny.device().type != "cpu":
        pytest.skip(f"on a CPU only: {only.args[0]}")


def pytest_generate_tests(metafunc):
    if "architecture" in metafunc.fixturenames:
        # One worker per architecture, so that what a worker has built is built once.
        params = [
            pytest.param(name, id=Path(name).stem, marks=pytest.mark.xdist_group(name))
            for name in metafunc.config.getoption("architecture") or TYPES
        ]
        metafunc.parametrize("architecture", params, scope="session")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def recorded(architecture):
    """What `record.py` wrote of the architecture."""
    if not golden_file(architecture).is_file():
        wanted = f"nothing was recorded of it yet: python tests/contract/record.py {architecture}"
        (pytest.fail if architecture in ARCHITECTURES else pytest.skip)(wanted)
    return golden(architecture)


@pytest.fixture(scope="session")
def whole_run(architecture, tmp_path_factory):
    """Some steps in one go, every step saved."""
    run = tmp_path_factory.mktemp(f"{Path(architecture).stem}-whole")
    score = train(*config(architecture, *HARD, *SHORT, *with_dropout(architecture)), run)
    return run, score


@pytest.fixture(scope="session")
def pair():
    with Pair() as processes:
        yield processes
