"""Whoever starts the processes of a run, it is the same run: ourselves, torchrun or accelerate. Each is a real one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.tiny import overrides
from trainer.commands import evaluate
from trainer.run.checkpoint import load_tensors

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [
    *PYTHON,
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]

pytestmark = pytest.mark.slow


def started(launcher, folder, *words):
    """A tiny run, from a folder that is not the project's."""
    return subprocess.run(
        [*launcher, str(ROOT / "mytrainer.py"), *overrides("vanilla"), f"output_dir={folder}", *words],
        cwd=folder.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "run"
    done = started(PYTHON, folder, "num_gpus=2")
    assert done.returncode == 0, done.stderr
    return folder


def weights(folder):
    return load_tensors(folder, "model.pt")


@pytest.mark.parametrize(
    ("launcher", "words"), [(TORCHRUN, ()), (ACCELERATE, ("num_gpus=2",))], ids=["torchrun", "accelerate"]
)
def test_the_same_run_by_another_launcher(ours, tmp_path, launcher, words):
    if launcher is ACCELERATE:
        pytest.importorskip("accelerate")
    done = started(launcher, tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    found, expected = weights(tmp_path / "run"), weights(ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    scores = [json.loads((run / "summary.json").read_text())["score"] for run in (tmp_path / "run", ours)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_another_number_of_processes_is_refused(tmp_path, launcher):
    if launcher is ACCELERATE:
        pytest.importorskip("accelerate")
    done = started(launcher, tmp_path / "run", "num_gpus=3")
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert (
        done.stderr.count("num_gpus is 3 but 2 processes were started. Use: torchrun --nproc_per_node=3") == 1
    )


def test_a_perplexity_does_not_depend_on_the_number_of_processes(ours, capsys):
    """Two scored the run, each of them every second row; here one does all, and some at a time."""
    expected = json.loads((ours / "summary.json").read_text())["score"]
    for rows in ("1", "7"):
        assert evaluate.main(["--checkpoint", str(ours), "--device", "cpu", "--batch_size", rows]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["num_samples"], found["num_tokens"]) == (expected["documents"], expected["tokens"])
        assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
        assert found["avg_loss"] == pytest.approx(math.log(expected["perplexity"]), rel=1e-6)
