"""Text that changes while a run reads it: the run ends, saved, and names the file; it goes on once that is back."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from tests.contract.pair import Pair
from tests.contract.test_run import assert_same_state
from tests.data.conftest import prose
from tests.data.shard_files import headerless
from tests.trainer import unreadable
from trainer.errors import TrainingError
from trainer.run.checkpoint import checkpoints_in, damage


@pytest.fixture
def shards(tmp_path: Path, monkeypatch) -> Path:
    """Two shards to train on, one held out, and the tokenizer that they are of."""
    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path / "cache"))
    ByteTokenizer().save(tmp_path / "bytes.json")
    for name, texts in {"t_1": range(9), "t_2": range(9, 18), "v_1": range(20, 23)}.items():
        ids = [[256, *prose(f"text {number}", 60)] for number in texts]
        path = headerless(tmp_path / f"shards/{name}.bin", np.concatenate(ids))
        os.utime(path, (1e9, 1e9))
    return tmp_path / "shards"


def words(shards: Path, **changes: object) -> list[str]:
    named = {
        "data": "bin",
        "train_files": shards / "t_*.bin",
        "val_files": shards / "v_1.bin",
        "shards_tokenizer": shards.parent / "bytes.json",
        "tokenizer": shards.parent / "bytes.json",
        "num_iterations": 8,
        "val_loss_every": 4,
        "val_bytes": "null",
        "ema_decay": 0.9,
        **changes,
    }
    return [f"{key}={value}" for key, value in named.items()]


@pytest.mark.parametrize(
    ("name", "how"),
    [("t_2", "cut off"), pytest.param("t_1", "touched", marks=pytest.mark.slow), ("v_1", "cut off")],
)
def test_a_shard_that_changes_ends_the_run_which_goes_on_once_it_is_back(shards, tmp_path, name, how) -> None:
    path, run, whole = shards / f"{name}.bin", tmp_path / "run", tmp_path / "whole"
    unreadable.train("gpt2", words(shards), whole)
    raw = path.read_bytes()
    cannot = pytest.raises(TrainingError, match=rf"{name}.bin' has changed since it was first read")
    with unreadable.changed(path, how, 3), cannot as error:
        unreadable.train("gpt2", words(shards), run)
    (kept,) = checkpoints_in(run)
    step = int(kept.name.partition("-")[2])
    assert step == 4 if name == "v_1" else 3 < step < 8, "what was trained is saved"
    assert damage(kept) is None
    error.match(
        rf"stopped at step {step}: .*The last complete checkpoint is {kept}. Go on with: .*resume={run}"
    )
    path.write_bytes(raw)
    os.utime(path, (1e9, 1e9))
    unreadable.train("gpt2", [*words(shards), "resume=auto"], run)
    assert_same_state(run / "checkpoint-8", whole / "checkpoint-8")


def test_before_the_first_step_nothing_is_saved(shards, tmp_path) -> None:
    with (
        unreadable.changed(shards / "t_1.bin", "cut off", -1),
        pytest.raises(TrainingError, match="stopped at step 0: .*t_1.bin' has changed.* Nothing was saved"),
    ):
        unreadable.train("gpt2", words(shards, val_loss_every=0), tmp_path / "run")
    assert not checkpoints_in(tmp_path / "run")


@pytest.fixture(scope="module")
def pair():
    with Pair() as both:
        yield both


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "first step", "score"])
def test_one_of_two_processes_cannot_read(shards, tmp_path, pair, where) -> None:
    """Both end, with the same message, and what both trained is saved."""
    run = tmp_path / "run"
    first, second = pair.ask(unreadable.refused, "gpt2", words(shards), run, where, 1)
    assert first == second and "cannot be read" in first
    saved = {"step": ["checkpoint-3"], "first step": [], "score": ["checkpoint-4"]}[where]
    assert [path.name for path in checkpoints_in(run)] == saved
