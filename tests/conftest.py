"""Every test process, before torch is imported: the project on the path, one thread that does not spin, and signals as
in a terminal."""

import gc
import logging
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MKL_NUM_THREADS", "1")
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and so would be what tests send


def pytest_addoption(parser):
    parser.addoption(
        "--architecture",
        action="append",
        default=[],
        metavar="TYPE|YAML",
        help="run the contract tests (tests/contract) on this architecture: a type of the table, or a YAML file "
        "whose package may lie beside it. May be given more than once; default: every type of the table",
    )
    parser.addoption(
        "--device",
        default="cpu",
        metavar="cpu|cuda|cuda:<n>|mps",
        help="run the contract tests (tests/contract) there, but for those that a CPU alone can pass; default: cpu",
    )


def pytest_configure(config):
    from tests.contract.located import code_of, located

    folder = config.invocation_params.dir
    try:
        config.option.architecture = [located(name, folder) for name in config.option.architecture]
        if modules := code_of(config.option.architecture):
            os.environ["MYTRAINER_TRUST"] = modules
    except ValueError as error:
        raise pytest.UsageError(f"--architecture: {error}") from None
    if config.option.device != "cpu":
        from tests.contract import tiny
        from trainer.distributed import choose_device

        try:
            tiny.run_on(choose_device(config.option.device))
        except (ValueError, RuntimeError) as error:  # RuntimeError: no device at all
            raise pytest.UsageError(f"--device: {str(error).splitlines()[0]}") from None


def pytest_collection_finish():
    """Modules and tests outlive every test: looking through them for garbage, and so often, is a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_runtest_setup(item):
    if "torch" in sys.modules:  # what a test draws without a seed is the same in any order of tests
        sys.modules["torch"].manual_seed(0)
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and none is visible")


@pytest.fixture
def in_process(monkeypatch):
    """For command lines in this process: what they change in it (paths, environment, Hydra and its log) is undone."""
    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.setattr(sys, "argv", ["mytrainer.py"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Hydra's --cfg and sweeps log to what is stdout then; this test's ends with it.
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    GlobalHydra.instance().clear()
    with mock.patch.dict(os.environ, HYDRA_FULL_ERROR="0"):
        yield
    GlobalHydra.instance().clear()


@pytest.fixture
def command(in_process, capsys):
    """A function that runs one command line in this process, as the shell would, and gives (stdout, stderr)."""
    import mytrainer

    def run(*words, status=0):
        capsys.readouterr()
        try:
            ended = mytrainer.main([str(word) for word in words])
        except SystemExit as leaving:
            ended = leaving.code
        out, err = capsys.readouterr()
        assert ended == status, err
        return out, err

    return run
