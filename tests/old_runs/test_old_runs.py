"""Runs made by earlier code still score, sample and resume. `make.py` says where they come from.

A failure here means that runs on people's disks no longer work: mend the code, do not record anew.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.old_runs.make import (
    EXPECTED,
    KEPT_STEP,
    eval_words,
    generate_words,
    losses_after,
    token_count,
    unpack,
)

RECORDED = json.loads(EXPECTED.read_text())


@pytest.fixture(params=sorted(RECORDED))
def type_(request):
    return request.param


@pytest.fixture
def expected(type_):
    return RECORDED[type_]


@pytest.fixture
def run(type_, tmp_path, in_process, monkeypatch):
    """The old run folder, in the working directory and called by its type."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    return unpack(type_, tmp_path)


def recorded_here(run: Path) -> bool:
    """Whether this machine rounds like the one that recorded the run, as far as the run tells."""
    environment = json.loads((run / "manifest.json").read_text())["environment"]
    here = {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    return here.items() <= environment.items()


def test_it_scores_as_it_did(type_, run, expected, command):
    out, _ = command(*eval_words(type_))
    result = json.loads(out)
    assert Path(result["checkpoint"]).name == f"checkpoint-{KEPT_STEP}" and result["weights"] == "EMA"
    assert result["score"]["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-4)


def test_it_writes_what_it_did(type_, run, expected, command):
    out, err = command(*generate_words(type_))
    assert token_count(err) == expected["tokens"] and out.strip()
    if recorded_here(run):  # elsewhere rounding may turn one draw, and all the text after it
        assert out == expected["text"]


def test_it_goes_on_to_the_same_end(type_, run, expected, command):
    """The losses and the score that the code of its day came to, behind the lines of its first life."""
    metrics, summary = run / "metrics.jsonl", run / "summary.json"
    old = metrics.read_text().splitlines()
    kept = [line for line in old if json.loads(line)["step"] <= KEPT_STEP]
    summary.unlink()  # of the whole run: what counts is the new one
    command(f"resume={type_}")
    new = metrics.read_text().splitlines()
    assert new[: len(kept)] == kept
    # Later lines were there before; speeds tell that these are of steps made now.
    assert len(new) == len(old) and not set(new[len(kept) :]) & {line for line in old if '"loss"' in line}
    assert losses_after(run, KEPT_STEP) == pytest.approx(expected["losses"], rel=1e-3)
    score = json.loads(summary.read_text())["score"]["bits_per_byte"]
    assert score == pytest.approx(expected["final_bits_per_byte"], rel=1e-4)
    last = max(map(int, expected["losses"]))
    assert (run / f"checkpoint-{last}" / "digests.json").exists()
