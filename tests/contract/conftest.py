"""Every architecture, tiny, through one contract. Being in the table enrols it; `--architecture` names others."""

from pathlib import Path

import pytest
import torch

from models import ARCHITECTURES
from naming import not_one_of
from tests.contract.tiny import TYPES


def pytest_generate_tests(metafunc):
    if "architecture" in metafunc.fixturenames:
        given = metafunc.config.getoption("architecture")
        chosen = [located(name, metafunc.config.invocation_params.dir) for name in given] or TYPES
        # One worker per architecture, so that what a worker has built is built once.
        params = [
            pytest.param(name, id=Path(name).stem, marks=pytest.mark.xdist_group(name)) for name in chosen
        ]
        metafunc.parametrize("architecture", params, scope="session")


def located(name: str, folder: Path) -> str:
    """A type of the table as it is, the path of a YAML file in full."""
    if name in ARCHITECTURES:
        return name
    if not (folder / name).is_file():
        raise pytest.UsageError(f"--architecture: no such file, and {not_one_of(name, TYPES)}")
    return str((folder / name).resolve())


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
