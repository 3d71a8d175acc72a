"""The leaderboard: tuned alike, paired, gone on with, ranked where told apart. Runs are made up (board.py)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mytrainer
from tests.contract.tiny import RUN
from tests.trainer.bench.board import Trainer
from trainer.bench.runs import subject
from trainer.commands import launch
from trainer.commands.leaderboard import scaled
from trainer.sweep.jobs import jobs_in

ROOT = Path(__file__).resolve().parents[3]
QUALITY = {"gpt2": 2.0, "vanilla": 2.5, "mtp": 2.5, "mdl": 3.0}


def quality(label, factor, seed):
    """x2 is the better rate of each; what a seed does, the models share, but for a little."""
    own = {"gpt2": 0.001, "vanilla": 0.002, "mtp": -0.003, "mdl": 0.004}[label]
    return QUALITY[label] - 0.1 * (factor == 2) + 0.3 * (seed % 3) + own * (seed % 2)


@pytest.fixture
def board(tmp_path, monkeypatch, capsys):
    """Run the command with a trainer: (exit status, what it printed, leaderboard.json)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(trainer, *words):
        monkeypatch.setattr(launch, "start", trainer)
        capsys.readouterr()
        status = mytrainer.main(["leaderboard", *words, "preset=nano", "--output", "board"])
        told = capsys.readouterr()
        path = tmp_path / "board/leaderboard.json"
        return (
            status,
            re.sub(r"\s+", " ", told.out + told.err),
            json.loads(path.read_text()) if path.exists() else None,
        )

    return run


def test_each_is_tuned_alike_and_scored_on_the_same_seeds(board, tmp_path):
    trainer = Trainer(quality)
    status, told, found = board(trainer, "gpt2", "vanilla", "--trials", "3", "--seeds", "3")
    assert status == 0
    tuned, scored = trainer.configs[:6], trainer.configs[6:]
    assert [cfg.seed for cfg in tuned] == [0] * 6 and {cfg.seed for cfg in scored} == {1, 2, 3}
    assert [cfg.type for cfg in scored] == ["gpt2", "vanilla"] * 3  # a seed of all after the other
    for type_ in ("gpt2", "vanilla"):
        once, twice, half = (cfg.learning_rate for cfg in tuned if cfg.type == type_)
        assert (twice, half) == (2 * once, once / 2)
        assert {cfg.learning_rate for cfg in scored if cfg.type == type_} == {twice}
    first, second = found["entries"]
    assert (first["label"], first["rank"], first["rate_factor"]) == ("gpt2", [1, 1], 2.0)
    assert (second["label"], second["rank"]) == ("vanilla", [2, 2])
    (pair,) = found["pairs"]
    assert pair["told_apart"] and pair["difference"] == pytest.approx(0.5, abs=0.01) and pair["low"] > 0
    assert pair["error_of_seeds"] < 0.01 < second["spread_of_seeds"]  # what the seeds share cancels
    assert pair["error_of_text"] > 0
    assert "held-out text" in found["how"][0] and "at the edge" in first["edge"]
    page = (tmp_path / "board/leaderboard.md").read_text()
    assert (
        "| 1 | gpt2 | 2.2007" in page and "same documents in the same order" in page and "told apart" in page
    )
    assert re.search(r"3 seeds can show a difference of 0\.00\d+ bits per byte", told)
    assert (tmp_path / "board/compare.html").exists()


def test_like_ones_share_their_ranks(board):
    status, told, found = board(Trainer(quality), "gpt2", "vanilla", "mtp", "--seeds", "3", "--trials", "1")
    ranks = {entry["label"]: entry["rank"] for entry in found["entries"]}
    assert ranks == {"gpt2": [1, 1], "vanilla": [2, 3], "mtp": [2, 3]}
    assert {entry["rate_factor"] for entry in found["entries"]} == {1.0}
    assert re.search("vanilla = mtp|mtp = vanilla", told) and "2-3" in told
    # Two of three pairs are told apart: intervals are as wide as that takes.
    assert found["level"] == pytest.approx(1 - 0.05 * 2 / 3)
    assert [pair["told_apart"] for pair in found["pairs"]] == [
        pair["low"] > 0 or pair["high"] < 0 for pair in found["pairs"]
    ]


def test_one_seed_ranks_nobody(board):
    _, told, found = board(Trainer(quality), "gpt2", "mdl", "--seeds", "1", "--trials", "1")
    assert [entry["rank"] for entry in found["entries"]] == [[1, 2], [1, 2]]
    assert re.search(r"mdl +<= 3\.30", told) and "<= is an upper bound" in told
    assert "One seed shows no spread" in told and found["shows"] is None
    assert found["pairs"][0]["high"] is None  # JSON has no infinity


def test_it_goes_on_where_it_stopped_and_takes_more(board, tmp_path, capsys):
    class Stopped(Trainer):
        def __call__(self, *args, **more):
            if len(self.trained) == 5:
                raise SystemExit(0)
            return super().__call__(*args, **more)

    with pytest.raises(SystemExit):
        board(Stopped(quality), "gpt2", "vanilla")
    assert "stopped; go on with: python mytrainer.py leaderboard gpt2 vanilla" in capsys.readouterr().out
    states = [job.state for job in jobs_in(tmp_path / "board")]
    assert sorted(states) == ["ok"] * 5 + ["stopped"]
    rest = Trainer(quality)
    status, told, _ = board(rest, "gpt2", "vanilla")
    assert status == 0 and len(rest.trained) == 5  # 4 trials and 6 seeds less the 5 that were there
    assert rest.configs[0].resume == "auto"  # the one that was stopped
    more = Trainer(quality)
    _, _, found = board(more, "gpt2", "vanilla", "mtp", "--seeds", "4")
    assert sorted(more.trained) == sorted(
        ["gpt2/x2-seed-4", "vanilla/x2-seed-4", "mtp/x1-tune", "mtp/x2-tune"]
        + [f"mtp/x2-seed-{seed}" for seed in (1, 2, 3, 4)]
    )
    assert [len(entry["scores"]) for entry in found["entries"]] == [4, 4, 4]


def test_what_fails_leaves_the_rest_alone(board):
    def some(label, factor, seed):
        failing = (label == "gpt2" and seed == 2) or (label == "vanilla" and factor == 2) or label == "mtp"
        return None if failing else quality(label, factor, seed)

    status, told, found = board(Trainer(some), "gpt2", "vanilla", "mtp")
    assert status == 1
    by = {entry["label"]: entry for entry in found["entries"]}
    assert by["gpt2"]["failed"] == {"2": "step 3 is not finite"} and len(by["gpt2"]["scores"]) == 2
    assert by["vanilla"]["rate_factor"] == 1.0 and len(by["vanilla"]["scores"]) == 3
    assert by["mtp"]["rank"] is None and "every trial failed" in by["mtp"]["edge"]
    assert [pair["seeds"] for pair in found["pairs"]] == [2]
    assert "gpt2, seed 2: step 3 is not finite" in told and "mtp has no rank: no score" in told


def test_another_text_is_set_apart(board, tmp_path):
    trainer = Trainer(quality)
    board(trainer, "gpt2", "vanilla", "mtp", "--trials", "1")
    for path in (tmp_path / "board/mtp").glob("*/manifest.json"):
        path.write_text(json.dumps({"data": {"content": "other", "heldout_bytes": 500}}))
    _, told, found = board(Trainer(quality), "gpt2", "vanilla", "mtp", "--trials", "1")
    assert found["entries"][-1]["label"] == "mtp" and found["entries"][-1]["rank"] is None
    assert "mtp has no rank: another held-out text" in told and len(found["pairs"]) == 1


def test_one_against_itself(board, tmp_path, capsys):
    trainer = Trainer(lambda label, factor, seed: 2.0 + 0.01 * [0, 3, -1, 2, -2, 1, 0, -3][seed - 1])
    status, told, _ = board(trainer, "gpt2", "--a_a", "--seeds", "4")
    assert status == 0 and [cfg.seed for cfg in trainer.configs] == list(range(1, 9))
    found = json.loads((tmp_path / "board/a_a.json").read_text())
    assert not found["told_apart"] and found["splits"] == 70 and found["splits_told_apart"] < 0.1
    assert "not told apart" in told and "gpt2, seeds 5 to 8 less gpt2, seeds 1 to 4" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no architecture is given"),
        (["gpt3"], "gpt3.*gpt2"),
        (["gpt2", "gpt2x", "vanila"], "(?s)gpt2x.*vanila"),
        (["gpt2", "seed=3"], "seed: this command decides it"),
        (["gpt2", "learning_rate=1e-3"], "learning_rate: this command decides"),
        (["gpt2", "output_dir=x"], "output_dir: this command decides"),
        (["gpt2", "num_iterations=-1"], "num_iterations"),
        (["gpt2", "seed=1,2"], "-m"),
        (["gpt2", "--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (["gpt2", "--trials", "9"], "--trials: must be 1 to 7, got 9"),
        (["gpt2", "vanilla", "--a_a"], "compares one architecture with itself"),
        (["gpt2", "--a_a", "--seeds", "1"], "--seeds: must be at least 2"),
    ],
)
def test_mistakes_are_told_before_anything_starts(board, tmp_path, words, told):
    trainer = Trainer(quality)
    status, said, _ = board(trainer, *words)
    assert status == 2 and re.search(told, said), said
    assert not trainer.trained and not (tmp_path / "board").exists()


def test_a_folder_of_other_settings_is_not_gone_on_with(board, tmp_path):
    board(Trainer(quality), "gpt2", "--trials", "1", "--seeds", "2")
    trainer = Trainer(quality)
    status, told, _ = board(trainer, "gpt2", "--trials", "1", "--seeds", "2", "num_iterations=7")
    assert status == 2 and not trainer.trained
    assert re.search(r"gpt2/x1-seed-1 was of num_iterations=\d+, and is asked for with 7", told)
    (tmp_path / "board/manifest.json").write_text("{}")
    assert "is the folder of a run" in board(trainer, "gpt2")[1]


@pytest.mark.slow
def test_real_runs_each_in_a_process_of_its_own(tmp_path):
    own = {
        "num_iterations": 3,
        "synthetic_bytes": 60_000,
        "val_bytes": "null",
    }  # of several held-out documents
    words = [word for word in RUN if word.partition("=")[0] not in own] + [f"{k}={v}" for k, v in own.items()]
    sizes = ["model_cfg.d_model=32", "model_cfg.n_layers=1", "model_cfg.n_heads=2", "model_cfg.n_ctx=32"]
    command = [sys.executable, str(ROOT / "mytrainer.py"), "leaderboard", "gpt2", "vanilla", "--seeds", "1"]
    command += ["--trials", "1", "--output", str(tmp_path / "board"), *words, *sizes]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "board/leaderboard.json").read_text())
    assert [len(entry["scores"]) for entry in found["entries"]] == [1, 1]
    assert found["pairs"][0]["error_of_text"] > 0
    assert "not finite" not in done.stdout and (tmp_path / "board/gpt2/x1-seed-1/console.txt").stat().st_size
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "..." not in again.stdout  # nothing left to train


def test_every_rate_that_is_read_is_scaled():
    def rates(*words, **changed):
        return scaled(subject("x", words[0], ["preset=nano", *words[1:]]).changed(**changed), 2.0)

    assert set(rates("gpt2", "optimizer=adamw")) == {"learning_rate"}
    own = rates("gpt2", "optimizer=muon")  # matrices have one of their own
    assert own == {"learning_rate": 0.002, "muon_learning_rate": 0.04}
    assert rates("memory")["memory_lr"] == 0.002
    adapted = rates("gpt2", use_lora=True)
    assert adapted["lora_lr"] == 2e-4 and "memory_bank_lr" not in adapted
