"""Sweeps by the command: which jobs are trained, gone on with or left, and how it ends. Training is replaced."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

import mytrainer
from configs.compose import prepare
from configs.messages import ConfigError
from trainer.commands import launch
from trainer.commands import sweep as command_of_sweeps
from trainer.commands import train as command
from trainer.errors import TrainingError
from trainer.sweep.jobs import jobs_in

WORDS = ["model=gpt2", "preset=tiny", "hydra.sweep.dir=s"]


@pytest.fixture
def sweep(tmp_path, in_process, monkeypatch):
    """A command in this process: its exit status. What is trained is in `seeds`; `ends` says how, by seed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mytrainer.py"])

    def start(cfg, model_cfg, folder, **options):
        run.seeds.append(cfg.seed)
        run.configs.append(cfg)
        end = run.ends.get(cfg.seed, 1.0 + cfg.seed / 100)
        if isinstance(end, BaseException):
            raise end
        folder.mkdir(parents=True, exist_ok=True)
        if end is not None:
            (folder / "summary.json").write_text(json.dumps({"score": {"bits_per_byte": end}}))
        return math.nan if end is None else end

    monkeypatch.setattr(launch, "start", start)

    def run(*words: str) -> int:
        run.seeds, run.configs = [], []
        return mytrainer.main([*words, "-m"])

    run.ends = {}
    return run


def states(folder: Path = Path("s")) -> dict[str, tuple[int, str]]:
    return {job.place.name: (job.config["seed"], job.state) for job in jobs_in(folder)}


def test_one_that_fails_or_diverges_or_is_stopped_leaves_the_others_alone(sweep, capsys):
    failed = launch.JobFailed(1, TrainingError("step 3 is not finite"))
    sweep.ends = {2: failed, 3: None, 4: math.nan}
    assert sweep(*WORDS, "seed=1,2,3,4,5") == 1
    assert sweep.seeds == [1, 2, 3, 4, 5]
    assert states() == {
        "0": (1, "ok"), "1": (2, "failed"), "2": (3, "stopped"), "3": (4, "failed"), "4": (5, "ok")
    }  # fmt: skip
    rows = json.loads(Path("s/summary.json").read_text())["jobs"]
    assert [row["bits_per_byte"] for row in rows] == [1.01, 1.05, None, None, None]
    assert "2 ok, 2 failed, 1 stopped" in (told := capsys.readouterr()).out and "Traceback" not in told.err
    assert "python mytrainer.py resume=" in told.out


@pytest.mark.slow
def test_batches_after_one_with_a_failure_are_started(sweep):
    sweep.ends = {1: launch.JobFailed(1, TrainingError("no memory"))}
    assert sweep(*WORDS, "seed=1,2,3", "hydra.sweeper.max_batch_size=1") == 1
    assert sweep.seeds == [1, 2, 3]


@pytest.mark.slow
def test_jobs_have_the_heads_that_the_grid_was_checked_with(sweep):
    words = ["model=sedd,gpt2", "hydra.sweep.dir=s", "model_cfg.d_model=64,128", "seed=1"]
    assert sweep(*words) == 0
    assert [(c.type, c.model_cfg["d_model"], c.model_cfg["n_heads"]) for c in sweep.configs] == [
        ("sedd", 64, 1), ("sedd", 128, 2), ("gpt2", 64, 1), ("gpt2", 128, 2)
    ]  # fmt: skip
    assert sweep(*words) == 2  # the folder holds a sweep
    assert sweep("resume=s") == 0 and sweep.seeds == []  # all of it is there


@pytest.mark.parametrize(
    ("words", "bound"),
    [
        (["hydra/launcher=submitit_local"], ["hydra.sweeper.max_batch_size=3"]),
        (["hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=9"], []),
        (["hydra/launcher=submitit_local", "device=cuda"], []),
        (["hydra/launcher=joblib"], []),
        ([], []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_launcher_without_a_bound_starts_no_more_jobs_than_cores(words, bound, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(command_of_sweeps, "available_cores", lambda: 3)
    monkeypatch.setattr("configs.hardware.cuda_device_count", lambda: 0)
    plan = prepare([*WORDS, "seed=1,2", *words, "-m"])
    assert command_of_sweeps._no_more_than_cores(plan) == bound
    assert any("jobs start 3 at a time" in note for note in plan.notices) == bool(bound)


def test_a_sweep_that_goes_on_trains_what_is_missing_and_numbers_what_is_new(sweep):
    sweep.ends = {2: launch.JobFailed(1, TrainingError("killed"))}
    sweep(*WORDS, "seed=1,2")
    sweep.ends = {}
    assert sweep("resume=s", "seed=3,2,1,4") == 0
    assert sweep.seeds == [3, 2, 4]  # the one that is done is left alone
    assert states() == {"0": (1, "ok"), "1": (2, "ok"), "2": (3, "ok"), "3": (4, "ok")}
    new, again, _ = sweep.configs
    assert (new.resume, again.resume) == ("none", "auto") and again.output_dir.endswith("s/1")
    assert sweep("resume=s", "device=cpu") == 0 and sweep.seeds == []  # another machine, the same runs


@pytest.mark.slow
def test_a_stop_ends_the_sweep_and_it_goes_on_where_it_was(sweep, capsys):
    sweep.ends = {2: SystemExit(0)}
    assert sweep(*WORDS, "seed=1,2,3") == 0 and sweep.seeds == [1, 2]
    assert "1 ok, 1 stopped, 1 not begun" in capsys.readouterr().out
    sweep.ends = {}
    assert sweep("resume=s") == 0 and sweep.seeds == [2, 3]


@pytest.mark.slow
def test_named_runs_lie_elsewhere_and_are_in_the_table(sweep):
    sweep.ends = {2: launch.JobFailed(1, TrainingError("killed"))}
    assert sweep(*WORDS, "seed=1", "model_name=a,b") == 0
    assert {job.run for job in jobs_in(Path("s"))} == {Path.cwd() / "checkpoints" / name for name in "ab"}
    assert [row["run"] for row in json.loads(Path("s/summary.json").read_text())["jobs"]] == [
        "../checkpoints/a", "../checkpoints/b"
    ]  # fmt: skip


@pytest.mark.slow
def test_two_sweeps_do_not_share_a_folder_and_no_run_is_there_twice(sweep):
    assert sweep(*WORDS, "seed=1") == 0
    with pytest.raises(
        ConfigError, match=r"already holds a sweep.*go on with it: python mytrainer.py resume="
    ):
        command.main([*WORDS, "seed=2", "-m"])
    with pytest.raises(ConfigError, match="jobs 0 and 1 of this sweep are the same run"):
        command.main([*WORDS[:2], "hydra.sweep.dir=t", "learning_rate=1e-3,0.001", "-m"])
    assert not Path("t").exists()


@pytest.mark.slow
def test_a_trial_that_cannot_be_is_a_failed_job(sweep, monkeypatch):
    """Those of other sweepers are checked when they start."""
    monkeypatch.setattr("trainer.commands.sweep.check_grid", lambda *args, **kwargs: None)
    assert sweep(*WORDS, "global_batch_size=8", "batch_size=3,4") == 1
    (bad, good) = jobs_in(Path("s"))
    assert (bad.state, good.state) == ("failed", "ok") and "must be divisible by batch_size (3)" in bad.why
