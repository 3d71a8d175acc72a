"""Every architecture of the table, tiny, through one contract. Being in the table is what enrols it."""

import pytest
import torch

from tests.contract.tiny import TYPES


def pytest_generate_tests(metafunc):
    if "type_" in metafunc.fixturenames:
        # One worker per architecture, so that what a worker has built is built once.
        params = [pytest.param(t, marks=pytest.mark.xdist_group(t)) for t in TYPES]
        metafunc.parametrize("type_", params, scope="session")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
