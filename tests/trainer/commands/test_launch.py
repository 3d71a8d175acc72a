"""How runs are started: folders, processes, signals, exit statuses. Training itself is replaced.

A command runs in this process (`run`); the slow tests start what only processes of its own can show (`started`).
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import mytrainer
from configs.messages import ConfigError
from configs.schema import RunConfig
from tests.contract.tiny import overrides
from trainer.commands import launch, train
from trainer.errors import LostPeer, TrainingError

ROOT = Path(__file__).resolve().parents[3]
ARCHITECTURE = """
from configs.schema import DefaultModelConfig

class Model:
    Config = DefaultModelConfig
"""
# Stands for `trainer.loop.train`.
TRAIN = """
import json, os, sys, time
from pathlib import Path

def train(cfg, model_cfg, folder, config_text):
    from trainer.errors import TrainingError
    if config_text:
        Path(folder, "config.yaml").write_text(config_text(cfg))
    facts = {"pid": os.getpid(), "parent": os.getppid(), "seed": cfg.seed,
             "env": os.environ.get("SOME_TOKEN"), "plain": os.environ.get("PLAIN"),
             "d_model": model_cfg.d_model, "argv": sys.argv, "torch": "torch" in sys.modules}
    Path(folder, f"ran-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts))
    if cfg.seed == 13:
        raise TrainingError("step 3 is not finite")
    if cfg.seed == 15:
        os.kill(os.getpid(), 9)
    if cfg.seed == 14:
        stopped = []
        import signal
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *a: stopped.append(a))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())  # as `train` does once it listens
        Path(folder, f"waiting-{os.environ.get('RANK', '0')}").touch()
        deadline = time.monotonic() + 60
        while not stopped and time.monotonic() < deadline:
            time.sleep(0.02)
        Path(folder, f"saved-{os.environ.get('RANK', '0')}").write_text(str(len(stopped)))
        return float("nan")
    score = {"bits_per_byte": abs(cfg.learning_rate - 0.5)}
    Path(folder, "summary.json").write_text(json.dumps({"score": score}))
    return score["bits_per_byte"]
"""
# Python runs this at start-up: `trainer.loop` is there before anyone imports it, and no torch with it.
SITE = f"""{TRAIN}
import types
module = types.ModuleType("trainer.loop")
module.train = train
sys.modules["trainer.loop"] = module
"""
MODEL = "defaults: [training, _self_]\ntype: 'plain_arch:Model'\n"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "plain_arch.py").write_text(ARCHITECTURE)
    (tmp_path / "mine.yaml").write_text(MODEL)
    return tmp_path


@pytest.fixture
def run(work, in_process, monkeypatch, capsys):
    """`python mytrainer.py ...` in this process and in `work`."""
    stand_in: dict = {}
    exec(TRAIN, stand_in)
    monkeypatch.setattr("trainer.loop.train", stand_in["train"])
    monkeypatch.setattr("configs.hardware.cuda_device_count", lambda: 0)
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(work)
    monkeypatch.delitem(sys.modules, "plain_arch", raising=False)

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        try:
            status = mytrainer.main([*words])
        except SystemExit as leaving:
            status = leaving.code
        return subprocess.CompletedProcess(words, status, *capsys.readouterr())

    yield command
    sys.modules.pop("plain_arch", None)


def popen(work: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    (work / "sitecustomize.py").write_text(SITE)
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "mytrainer.py"), *words],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(work), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def started(work: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    process = popen(work, *words, launcher=launcher)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def facts(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"ran-{rank}.json").read_text())


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(p.exists() for p in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)


# -- one process -----------------------------------------------------------------------------------------


def test_a_single_run_trains_in_this_process_and_leaves_one_folder(work, run):
    done = run("mine.yaml", "output_dir=out", "seed=5", "env.PLAIN=x", "env.SOME_TOKEN=t0p")
    assert done.returncode == 0, done.stderr
    found = facts(work / "out")
    assert (found["seed"], found["plain"], found["env"], found["pid"]) == (5, "x", "t0p", os.getpid())
    created = {p.name for p in work.iterdir()} - {"__pycache__"}
    assert created == {"plain_arch.py", "mine.yaml", "out"}
    assert {p.name for p in (work / "out").iterdir()} == {"config.yaml", "ran-0.json", "summary.json"}
    saved = "".join(
        p.read_text() for p in (work / "out").rglob("*.*") if p.is_file() and p.name != "ran-0.json"
    )
    assert "t0p" not in saved + done.stdout + done.stderr and "t0p" not in str(found["argv"])
    assert f"{work / 'mine.yaml'} (sha256" in (work / "out" / "config.yaml").read_text()


@pytest.mark.slow
def test_the_environment_is_set_before_torch_is_there(work):
    done = started(work, "mine.yaml", "output_dir=out", "env.PLAIN=x")
    assert done.returncode == 0, done.stderr
    found = facts(work / "out")
    assert (found["plain"], found["torch"]) == ("x", False)


def test_the_folder_is_named_by_output_dir_model_name_or_the_clock(work, run):
    assert run("mine.yaml", "model_name=dante").returncode == 0
    assert (work / "checkpoints" / "dante" / "config.yaml").exists()
    assert run("mine.yaml").returncode == 0
    (folder,) = (work / "outputs").iterdir()
    assert folder.name.startswith("Model-20") and (folder / "config.yaml").exists()


def test_the_saved_config_runs_again(work, run):
    assert run("mine.yaml", "output_dir=a", "seed=6", "sample_prompt=no: 1e-4").returncode == 0
    assert run("a/config.yaml", "output_dir=b").returncode == 0
    first, second = (OmegaConf.to_container(OmegaConf.load(work / d / "config.yaml")) for d in "ab")
    assert {**first, "output_dir": "b"} == second and second["sample_prompt"] == "no: 1e-4"


def test_a_training_failure_is_one_message_and_status_1(run, monkeypatch):
    done = run("mine.yaml", "output_dir=out", "seed=13")
    assert (done.returncode, done.stderr.strip()) == (1, "error: step 3 is not finite")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(TrainingError, match="step 3 is not finite"):
        run("mine.yaml", "output_dir=out2", "seed=13")


def test_a_configuration_error_is_status_2_and_starts_nothing(work, run, monkeypatch):
    done = run("mine.yaml", "output_dir=out", "seed=x")
    assert done.returncode == 2 and done.stderr.endswith("1 problem; nothing was started\n")
    assert "Traceback" not in done.stderr and not (work / "out").exists()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError, match="expected int"):
        run("mine.yaml", "seed=x")


def test_a_folder_that_cannot_be_written_is_a_clear_error(run):
    done = run("mine.yaml", "output_dir=mine.yaml/below")
    assert done.returncode == 2
    assert "cannot write to mine.yaml/below: Not a directory. Choose another output_dir" in done.stderr


def test_no_model_at_all(run):
    done = run()
    assert done.returncode == 2 and "no model chosen" in done.stderr and "gpt2" in done.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--help"], "Models (--hydra_model_cfg"),
        (["mine.yaml", "--help"], "type: plain_arch:Model"),
        (["mine.yaml", "--cfg", "job", "--resolve"], "learning_rate: 0.0006"),
        (["mine.yaml", "--cfg", "job", "--package", "model_cfg", "model_cfg.d_model=96"], "d_model: 96"),
        (["mine.yaml", "--info", "defaults-tree"], "configs/training"),
        (["mine.yaml", "--cfg", "hydra"], "  sweep:\n    dir: multirun/"),
        (["--info", "plugins"], "BasicSweeper"),
        (["--info"], "Config search path"),
        (["--config-dir", ".", "--info", "searchpath"], "command-line"),
        (["--help", "show"], "Sizes and costs of a configuration"),
        # Hydra looks through the whole project for this one.
        pytest.param(["--hydra-help"], "Hydra", marks=pytest.mark.slow),
    ],
)
def test_what_is_only_shown(work, run, words, text):
    done = run(*words)
    assert done.returncode == 0 and text in done.stdout, done.stderr
    assert not (work / "outputs").exists()


@pytest.mark.parametrize("env", ["env.PLAIN=[1]", "env={PLAIN: [1]}", "env=3"])
def test_an_environment_of_other_things_than_text_is_refused(run, env):
    done = run("mine.yaml", env)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "config error: " in done.stderr


def test_numbers_in_the_environment_of_a_file_are_text(work, run):
    (work / "mine.yaml").write_text(MODEL + "env: {PLAIN: 7}\n")
    assert run("mine.yaml", "output_dir=here").returncode == 0
    assert facts(work / "here")["plain"] == "7"


def test_cfg_job_is_printed_before_the_model_is_imported_and_then_says_what_a_run_would(
    work, run, capsys, monkeypatch
):
    printed = []
    check = train.check
    monkeypatch.setattr(train, "check", lambda *args: printed.append(capsys.readouterr().out) or check(*args))
    done = run("mine.yaml", "--cfg", "job", "muon_momentum=0.8", "env.FOO=1")
    assert done.returncode == 0 and not (work / "outputs").exists()
    assert printed[0].startswith("defaults:\n- training\n- _self_\n") and "muon_momentum: 0.8" in printed[0]
    assert "note: not read by this run: muon_momentum (because of optimizer=adamw)" in done.stderr


def test_cfg_prints_an_invalid_config_and_then_its_problems(run):
    done = run("mine.yaml", "--cfg", "job", "seed=x", "env.MY_KEY=k3y")
    assert done.returncode == 2 and "seed: x" in done.stdout and "expected int" in done.stderr
    assert "k3y" not in done.stdout + done.stderr


# -- sweeps ----------------------------------------------------------------------------------------------


def jobs(work: Path) -> list[Path]:
    return sorted(p.parent for p in work.glob("multirun/*/*/*/ran-0.json"))


@pytest.mark.slow
def test_each_job_of_a_sweep_has_a_process_of_its_own(work):
    (work / "other.yaml").write_text("defaults: [mine, _self_]\nmodel_cfg: {d_model: 96}\n")
    done = started(work, "--hydra_model_cfg=mine.yaml,other.yaml", "seed=1,2", "-m")
    assert done.returncode == 0, done.stderr
    found = [facts(f) for f in jobs(work)]
    assert [(f["d_model"], f["seed"]) for f in found] == [(768, 1), (768, 2), (96, 1), (96, 2)]
    assert len({f["pid"] for f in found}) == 4 and len({f["parent"] for f in found}) == 1


@pytest.mark.slow
def test_a_sweep_over_models_trains_them_with_the_fields_they_share(tmp_path):
    shared = [w for w in overrides("gpt2", "num_iterations=2") if "gpt2" not in w]
    command = [sys.executable, str(ROOT / "mytrainer.py"), "--hydra_model_cfg=gpt2,vanilla", "-m", "seed=1,2"]
    done = subprocess.run([*command, *shared], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = [OmegaConf.load(p) for p in sorted(tmp_path.glob("multirun/*/*/*/config.yaml"))]
    assert [(c.type, c.seed, c.device) for c in found] == [
        (type_, seed, "cpu") for type_ in ("gpt2", "vanilla") for seed in (1, 2)
    ]


def test_one_bad_point_starts_no_job(work, run):
    done = run("mine.yaml", "seed=1,x,y", "-m")
    assert done.returncode == 2 and "job 1 (seed=x)" in done.stderr and "job 2 (seed=y)" in done.stderr
    assert not (work / "multirun").exists()


@pytest.mark.slow
def test_a_failed_job_fails_the_sweep_without_a_traceback(work):
    done = started(work, "mine.yaml", "seed=13,1", "-m")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "job 0: the run ended with exit status 1" in done.stderr
    assert len(jobs(work)) == 2  # the second ran nevertheless


def require_optuna() -> None:
    """Its plugin, with the releases that a study can be kept with, as the extra pins them."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    if int(version("sqlalchemy").split(".")[0]) >= 2:
        pytest.skip("optuna keeps no study with SQLAlchemy 2")


@pytest.mark.slow
def test_optuna_minimises_the_score(work):
    require_optuna()
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "learning_rate=interval(0.1,0.9)", "-m"]
    done = started(work, "mine.yaml", *words)
    assert done.returncode == 0, done.stderr
    (results,) = work.glob("multirun/*/*/optimization_results.yaml")
    best = OmegaConf.load(results)
    rates = [OmegaConf.load(f / "config.yaml").learning_rate for f in jobs(work)]
    assert len(rates) == 3
    assert best.best_value == pytest.approx(min(abs(r - 0.5) for r in rates))
    # The study is as long as it is said to be in all, and draws on: no rate twice.
    words = [f"resume={results.parent}", "hydra.sweeper.n_trials=5", "trust=plain_arch", "-m"]
    done = started(work, *words)
    assert done.returncode == 0, done.stderr
    longer = [OmegaConf.load(f / "config.yaml").learning_rate for f in jobs(work)]
    assert len(set(longer)) == 5 and set(rates) < set(longer)
    assert [f.name for f in jobs(work)] == ["0", "1", "2", "3", "4"]


@pytest.mark.slow
def test_of_four_trials_one_diverges_one_is_killed_and_four_rows_are_there(work):
    require_optuna()
    words = [
        "hydra/sweeper=optuna",
        "hydra/sweeper/sampler=grid",
        "hydra.sweeper.n_trials=4",
        "hydra.sweep.dir=s",
    ]
    done = started(work, "mine.yaml", *words, "seed=choice(13,15,1,2)", "-m")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    rows = json.loads((work / "s" / "summary.json").read_text())["jobs"]
    assert {row["fields"]["seed"]: row["state"] for row in rows} == {
        1: "ok",
        2: "ok",
        13: "failed",
        15: "failed",
    }
    why = {row["fields"]["seed"]: row["why"] for row in rows}
    assert why[13] == "step 3 is not finite" and "ended by SIGKILL" in why[15]


SBATCH = """#!/bin/sh
cp "$1" "$SEEN"
for task in 0 1; do
  SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 \\
    SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here sh "$1" > "$SEEN.$task" 2>&1 &
done
echo "Submitted batch job 7"
"""
# Its own options end where Python begins.
SRUN = """#!/bin/sh
while case "$1" in *python*) false ;; *) true ;; esac; do shift; done
exec "$@"
"""
SACCT = """#!/bin/sh
printf 'JobID|State|NodeList\\n7_0|RUNNING|here\\n7_1|RUNNING|here\\n'
"""


@pytest.mark.slow
def test_slurm_is_handed_one_job_a_point_with_what_was_asked_for(work, monkeypatch):
    pytest.importorskip("submitit")
    (work / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT), ("scontrol", "#!/bin/sh\n")):
        (work / "bin" / name).write_text(text)
        (work / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(work / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("SEEN", str(work / "seen"))
    launcher = ["partition=gpu", "gpus_per_node=2", "timeout_min=30", "array_parallelism=2"]
    words = ["hydra/launcher=submitit_slurm", *(f"hydra.launcher.{word}" for word in launcher)]
    done = started(work, "mine.yaml", "seed=1,13", *words, "hydra.sweep.dir=s", "-m")
    assert done.returncode == 1 and "job 1: the run ended with exit status 1" in done.stderr
    script = (work / "seen").read_text()
    for line in ("--array=0-1%2", "--partition=gpu", "--gpus-per-node=2", "--time=30", "--signal=USR2@"):
        assert f"#SBATCH {line}" in script
    assert f"{sys.executable} -u -m submitit.core._submit" in script and str(work / "s") in script
    assert [row["state"] for row in json.loads((work / "s" / "summary.json").read_text())["jobs"]] == [
        "ok",
        "failed",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_other_launchers(work, launcher):
    pytest.importorskip({"joblib": "hydra_plugins.hydra_joblib_launcher"}.get(launcher, "submitit"))
    (work / "sub").mkdir()
    (work / "sub" / "with blank.yaml").write_text("defaults: [../mine, _self_]\n")
    (work / "preset" / "for").mkdir(parents=True)
    (work / "preset" / "for" / "Model-tiny.yaml").write_text("model_cfg: {d_model: 60}\n")
    words = ["seed=1,2", "preset=tiny", f"hydra/launcher={launcher}", "-m"]
    done = started(work, "sub/with blank.yaml", *words)
    assert done.returncode == 0, done.stderr
    assert [(facts(f)["seed"], facts(f)["d_model"]) for f in jobs(work)] == [(1, 60), (2, 60)]


# -- several processes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_num_gpus_starts_that_many_processes(work):
    done = started(work, "mine.yaml", "num_gpus=2", "device=cpu", "output_dir=out")
    assert done.returncode == 0, done.stderr
    assert len({facts(work / "out", r)["pid"] for r in (0, 1)}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("words", [("num_gpus=2",), ()])
def test_torchrun_is_joined_and_rank_0_alone_decides_the_folder(work, words):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = started(work, "mine.yaml", *words, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    (folder,) = (work / "outputs").iterdir()
    assert {p.name for p in folder.glob("ran-*")} == {"ran-0.json", "ran-1.json"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "text"), [(("seed=x",), "expected int"), (("seed=1,2", "-m"), "Instead of torchrun use")]
)
def test_an_error_under_torchrun_is_said_once_and_ends_every_rank(work, words, text):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = started(work, "mine.yaml", *words, launcher=torchrun)
    assert done.returncode != 0 and done.stderr.count(text) == 1
    assert done.stderr.count("nothing was started") == 1 and not (work / "outputs").exists()


# -- signals ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_job_once_and_ends_the_sweep(work, number):
    process = popen(work, "mine.yaml", "seed=14,1", "hydra.sweep.dir=sweep", "-m")
    wait_for(work / "sweep" / "0" / "waiting-0")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (work / "sweep" / "0" / "saved-0").read_text() == "1"
    assert not (work / "sweep" / "1" / "ran-0.json").exists()


@pytest.mark.slow
def test_a_signal_reaches_every_process_once(work):
    process = popen(work, "mine.yaml", "seed=14", "num_gpus=2", "device=cpu", "output_dir=out")
    wait_for(work / "out" / "waiting-0", work / "out" / "waiting-1")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert [(work / "out" / f"saved-{r}").read_text() for r in (0, 1)] == ["1", "1"]


@pytest.mark.slow
def test_processes_save_and_leave_when_who_started_them_is_killed(work):
    process = popen(work, "mine.yaml", "seed=14", "num_gpus=2", "device=cpu", "output_dir=out")
    wait_for(work / "out" / "waiting-0", work / "out" / "waiting-1")
    process.kill()
    wait_for(work / "out" / "saved-0", work / "out" / "saved-1")
    assert [(work / "out" / f"saved-{r}").read_text() for r in (0, 1)] == ["1", "1"]
    process.communicate(timeout=60)  # nobody holds its output any more


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_other_says_nothing_of_it(tmp_path):
    words = overrides(
        "gpt2", "num_gpus=2", f"output_dir={tmp_path}", "num_iterations=100000", "val_loss_every=0"
    )
    command = [sys.executable, str(ROOT / "mytrainer.py"), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "metrics.jsonl")
    (worker,) = (
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    os.kill(worker, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in said and "gloo" not in said
    assert f"error: process 1 of 2 (pid {worker}) was ended by SIGKILL" in said
    assert f"Its log is {tmp_path}/process-1.log. Nothing had been saved" in said
    assert "process 1 of 2 begins" in (tmp_path / "process-1.log").read_text()


# -- small parts -----------------------------------------------------------------------------------------


def test_env_already_set_wins(monkeypatch, capsys):
    monkeypatch.setenv("AAA", "old")
    monkeypatch.delenv("BBB", raising=False)
    monkeypatch.delenv("C_KEY", raising=False)
    launch.apply_env({"AAA": "new", "BBB": "1", "C_KEY": "<redacted>"}, {})
    assert (os.environ.pop("AAA"), os.environ.pop("BBB")) == ("old", "1")
    err = capsys.readouterr().err
    assert "env.AAA: the environment has 'old'" in err and "env.C_KEY was not saved" in err


def test_outcome_of_a_worker(tmp_path):
    report = tmp_path / "result.json"
    with pytest.raises(launch.JobFailed):
        launch._outcome(
            tmp_path, tmp_path, launch.Ended(0), []
        )  # ended well, it says, without a word about the score
    report.write_text('{"status": 0, "score": 1.25}')
    assert launch._outcome(tmp_path, tmp_path, launch.Ended(0), []) == 1.25
    report.write_text('{"status": 0, "score": null}')
    assert math.isnan(launch._outcome(tmp_path, tmp_path, launch.Ended(0), []))
    report.write_text('{"status": 2, "score": null}')
    with pytest.raises(launch.JobFailed) as failed:
        launch._outcome(tmp_path, tmp_path, launch.Ended(1), [])
    assert failed.value.status == 2 and failed.value.error is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError(["a: b", "c: d"]), ConfigError),
        (TrainingError("step 3 is not finite"), TrainingError),
        (UnicodeError("no UTF-8"), ValueError),
        (OSError("disk full"), OSError),
    ],
)
def test_what_a_worker_could_not_do_arrives_as_its_own_error(tmp_path, error, kind):
    launch._send_error(tmp_path, error)
    with pytest.raises(launch.JobFailed) as failed:
        launch._outcome(tmp_path, tmp_path, launch.Ended(1), [])
    assert type(failed.value.error) is kind and str(failed.value.error) == str(error)


def test_a_worker_that_was_killed_can_say_nothing(tmp_path, monkeypatch):
    """Which it was, and where its log lies; not what the others made of it."""
    post, folder = tmp_path / "post", tmp_path / "run"
    post.mkdir()
    (folder / "checkpoint-40").mkdir(parents=True)
    (post / "process-1.log").write_text("Fatal Python error")
    monkeypatch.setenv("RANK", "0")
    launch._send_error(post, LostPeer("another process of the run has ended"))
    for number, why in ((signal.SIGKILL, ", as the system does where memory runs out"), (signal.SIGSEGV, "")):
        with pytest.raises(launch.JobFailed) as failed:
            launch._outcome(post, folder, launch.Ended(-number, 1, 2, 77), [])
        assert failed.value.status == 1
        assert str(failed.value.error) == (
            f"process 1 of 2 (pid 77) was ended by {number.name}{why}. Its log is {folder}/process-1.log. "
            f"resume={folder} goes on from checkpoint-40"
        )
    assert (folder / "process-1.log").read_text() == "Fatal Python error"


def test_a_worker_that_failed_beside_the_first_is_named(tmp_path):
    """What it said is on no console."""
    (tmp_path / "process-1.log").write_text("Traceback")
    with pytest.raises(launch.JobFailed) as failed:
        launch._outcome(tmp_path, tmp_path / "run", launch.Ended(1, 1, 2, 77), [])
    assert "process 1 of 2 (pid 77) failed with status 1. Its log is " in str(failed.value.error)


class Child:
    """A process that has ended, or does when it is killed."""

    pid = 7

    def __init__(self, returncode):
        self.ends_with, self.returncode = returncode, None

    def poll(self):
        self.returncode = self.ends_with
        return self.returncode

    def kill(self):
        self.ends_with = self.ends_with or -9


@pytest.mark.parametrize("failed", [0, 1])
def test_who_waits_for_a_failed_process_is_ended(failed):
    children = [Child(None), Child(None)]
    children[failed].ends_with = 3
    ended = launch._wait(children, grace=0.0)
    assert (ended.status, ended.rank) == (3, failed), "the one that failed, not the one that was ended"
    assert sorted(child.returncode for child in children) == [-9, 3]


def test_a_process_that_a_signal_ended_is_the_one_that_failed():
    """The other has only lost it."""
    children = [Child(1), Child(-signal.SIGKILL)]
    assert launch._wait(children) == launch.Ended(-signal.SIGKILL, 1, 2, 7)


def test_run_folder_names(tmp_path):
    cfg = RunConfig(type="a.b:Model")
    assert launch.run_folder(cfg, Path("x")) == Path("x")
    names = {launch.run_folder(cfg).name for _ in range(20)}
    assert len(names) > 1 and all(n.startswith("Model-") for n in names)


def test_require_writable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to"):
        launch.require_writable(tmp_path / "file" / "x")
    launch.require_writable(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []
