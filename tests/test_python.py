"""`from mytrainer import load, metrics, train`: what they give, and that the process is as it was before."""

import gc
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton

import mytrainer
from configs.messages import ConfigError
from mytrainer import load, metrics, train
from tests.contract.tiny import overrides
from trainer.errors import TrainingError

ROOT = Path(__file__).resolve().parents[1]
OF_THE_CLOCK = ("seconds", "tokens_per_second", "eta_seconds", "mfu")


def words(*more):
    return overrides("gpt2", "num_iterations=2", "val_loss_every=0", *more)


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(summary of a run, what the process was before and after it)"""
    folder = tmp_path_factory.mktemp("run") / "first"
    given = words(f"output_dir={folder}", "model_cfg.dropout=0.1")
    before = process()
    summary = train(given)
    return summary, before, process()


def process():
    """What a call must leave as it is."""
    drawn = random.getstate(), [str(part) for part in np.random.get_state()], torch.get_rng_state().tolist()
    woken = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(woken)
    return {
        "torch's threads": torch.get_num_threads(),
        "threads": {thread.name for thread in threading.enumerate()},
        "seeds": drawn,
        "signal handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "wakeup": woken,
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "arguments": (id(sys.argv), list(sys.argv)),
        "path": list(sys.path),
        "streams": (sys.stdout, sys.stderr),
        "warnings": list(warnings.filters),
        "logging": (list(logging.root.handlers), logging.root.level),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "process group": torch.distributed.is_initialized(),
        "hydra": {kind.__name__: id(one) for kind, one in Singleton._instances.items()},
        "stored configurations": repr(ConfigStore.instance().repo),
        "a composition of hydra's": GlobalHydra.instance().is_initialized(),
    }


def differences(before, after):
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def of_the_model(columns):
    return {name: column for name, column in columns.items() if name not in OF_THE_CLOCK}


# -- train -----------------------------------------------------------------------------------------------------------


def test_a_training_gives_its_summary_and_its_folder(run):
    summary, _, _ = run
    folder = Path(summary["folder"])
    written = json.loads((folder / "summary.json").read_text())
    assert folder.is_absolute() and summary == {**written, "folder": str(folder)}
    assert summary["steps"] == 2 and summary["score"]["bits_per_byte"] > 0
    program, *given = json.loads((folder / "manifest.json").read_text())["argv"]
    assert program == "mytrainer.py" and "++model_cfg.dropout=0.1" in given


def test_again_in_the_same_process_it_gives_the_same(run, work):
    first, _, _ = run
    load(first["folder"]).generate("a", max_new_tokens=2)
    torch.manual_seed(1)
    np.random.seed(2)
    second = train(words("output_dir=second", "model_cfg.dropout=0.1"))
    assert of_the_model(metrics("second")) == of_the_model(metrics(first["folder"]))
    assert second["score"] == first["score"] and second["folder"] == str(work / "second")
    weights = [
        torch.load(Path(f, "model.pt"), weights_only=True) for f in (first["folder"], second["folder"])
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_it_gives_what_the_command_line_gives(run, command):
    command(*words("output_dir=there", "model_cfg.dropout=0.1"))
    assert of_the_model(metrics("there")) == of_the_model(metrics(run[0]["folder"]))


def test_numbers_do_not_depend_on_what_the_process_has_set(run):
    """Nor do they change it."""
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.float16), torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        given = words("output_dir=odd", "model_cfg.dropout=0.1")
        try:
            before = process()
            summary = train(given)
            assert differences(before, process()) == {}
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
    assert summary["score"] == run[0]["score"]


def test_a_run_is_gone_on_with_and_one_that_has_nothing_left_gives_its_summary(capsys):
    train(words("output_dir=short", "num_iterations=1"))
    longer = train(["resume=short", "num_iterations=2"])
    assert longer["steps"] == 2 and longer["score"] == train(words("output_dir=whole"))["score"]
    capsys.readouterr()
    assert train(["resume=short"]) == longer
    assert "nothing to do: step 2 >= num_iterations 2" in capsys.readouterr().out


def test_a_folder_named_by_the_clock_and_a_change_of_directory(work, monkeypatch):
    summary = train(words())
    assert Path(summary["folder"]).parent == work / "outputs"
    monkeypatch.chdir("/")
    assert load(summary["folder"]).score("ab").bits_per_byte > 0


def test_notes_are_said_as_on_the_command_line(capsys):
    train([*words("output_dir=out", "seed=1"), "seed=2"])
    assert "note: seed is given more than once; the last value counts" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["-m"], ["--cfg", "job"], ["--info"], ["--help"]])
def test_what_shows_something_or_starts_several_is_refused(given):
    with pytest.raises(ConfigError, match="one run is meant here. Leave out --cfg, --info, --help and -m"):
        train([*words(), *given])


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (["num_itertions=3"], ConfigError, r"unknown key 'num_itertions'. Did you mean 'num_iterations'"),
        (["seed=1,2"], ConfigError, "seed has several values for one run"),
        (["data=text", "input_file=nowhere.txt"], ValueError, "nowhere.txt"),
        (["num_epochs=0.0001"], ValueError, "num_epochs=0.0001 is less than one step"),
        (["learning_rate=1e38", "max_grad_norm=0"], TrainingError, "step [01] is not finite"),
        (["init_from_checkpoint=missing"], ConfigError, "missing"),
    ],
)
def test_wrong_input_raises_what_the_command_line_prints(command, capsys, given, kind, message):
    once, twice = (words(*given, f"output_dir={name}") for name in ("once", "twice"))
    before = process()
    with pytest.raises(kind, match=message) as caught:
        train(once)
    assert differences(before, process()) == {} and caught.value.__cause__ is not caught.value
    first, *_ = text = str(caught.value).split("\n")
    assert first not in capsys.readouterr().err, "whoever catches it says it"
    printed = command(*twice, status=1 if kind is TrainingError else 2)[1]
    assert all(line.replace("once", "twice") in printed for line in text)


@pytest.mark.parametrize("given", ["preset=nano", ["model=gpt2", Path("x")]])
def test_words_are_a_list_of_texts(given):
    with pytest.raises(ValueError, match=r'overrides: a list of words is meant, such as \["model=gpt2", '):
        train(given)


def test_processes_of_a_launcher_are_for_the_command_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun ... mytrainer.py"):
        train(words())


def test_the_environment_of_a_configuration_lasts_as_long_as_the_run(monkeypatch, capsys):
    found = {}
    real = mytrainer.guest.sys.modules["trainer.loop"].train

    def loop(*arguments):
        found.update(os.environ)
        return real(*arguments)

    monkeypatch.setattr("trainer.loop.train", loop)
    monkeypatch.setenv("MYTRAINER_BEGAN", "1")
    train(words("output_dir=out", "env.FROM_A_CONFIG=yes"))
    assert found["FROM_A_CONFIG"] == "yes" and "FROM_A_CONFIG" not in os.environ
    assert float(found["MYTRAINER_BEGAN"]) > time.time() - 60, "a budget counts from the call"
    assert os.environ["MYTRAINER_BEGAN"] == "1"
    assert "torch has been imported already, so what it reads of FROM_A_CONFIG" in capsys.readouterr().err


def test_on_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(train(words("output_dir=out"))))
    thread.start()
    thread.join()
    assert found[0]["steps"] == 2


def test_one_at_a_time(monkeypatch):
    """Two would draw from the same generators."""

    def within(*arguments):
        with pytest.raises(TrainingError, match="a training is going on in this process already"):
            train(["model=gpt2"])
        raise TrainingError("seen")

    monkeypatch.setattr("trainer.loop.train", within)
    for _ in range(2):
        with pytest.raises(TrainingError, match="^seen$"):
            train(words("output_dir=out"))


class Notebook:
    """A stream as a notebook has it: no descriptor, no buffer."""

    encoding = "UTF-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return False

    def fileno(self):
        raise OSError("fileno")


def test_in_a_notebook(monkeypatch):
    out, err = Notebook(), Notebook()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    train([*words("output_dir=out", "seed=1"), "seed=2"])
    assert (
        "2/2  loss" in out.text
        and "bits per byte of the held-out text" in out.text
        and "note: seed" in err.text
    )
    assert "\x1b" not in out.text and sys.stdout is out


def when_it_has_begun(folder, times=1):
    """Ctrl-C as soon as there is a line of metrics."""

    def press():
        deadline = time.monotonic() + 30
        while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.6)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def test_ctrl_c_saves_and_says_how_to_go_on(work):
    long = words("output_dir=out", "num_iterations=100000", "logging_steps=1")
    before = process()
    thread = when_it_has_begun(work / "out")
    with pytest.raises(KeyboardInterrupt, match="^stopped; go on with: train") as stopped:
        train(long)
    thread.join()
    assert differences(before, process()) == {}
    (word,) = eval(str(stopped.value).partition("train(")[2].rstrip(")"))
    assert word == f"resume={work / 'out'}"
    done = max(metrics("out")["step"])
    assert train([word, f"num_iterations={done + 1}", "lr_decay_steps=null"])["steps"] == done + 1


def test_another_signal_then_does_what_it_does_in_the_process(work):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        thread = threading.Timer(
            0, lambda: (when_it_has_begun(work / "out", times=0).join(), os.kill(os.getpid(), signal.SIGUSR1))
        )
        thread.start()
        with pytest.raises(KeyboardInterrupt, match="go on with"):
            train(words("output_dir=out", "num_iterations=100000", "logging_steps=1"))
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


# -- the process is as it was ----------------------------------------------------------------------------------------


def test_a_training_leaves_the_process_as_it_was(run):
    _, before, after = run
    assert differences(before, after) == {}


def test_so_does_looking_into_a_run(run):
    before = process()
    model = load(run[0]["folder"])
    model.score("some text")
    model.generate(["a", "b"], max_new_tokens=3)
    model.hidden("ab", layer=0)
    model.logits("ab")
    metrics(run[0]["folder"])
    with pytest.raises(ValueError, match="temperature"):
        model.generate("a", temperature=-1)
    assert differences(before, process()) == {}


def test_descriptors_do_not_pile_up(run):
    def opened():
        gc.collect()  # what earlier tests left in cycles closes now, not between the two counts
        return set(os.listdir("/proc/self/fd"))

    before = opened()
    train(words("output_dir=out"))
    load("out").score("ab")
    assert opened() <= before


def test_generators_of_a_gpu_still_begin_at_the_seed_of_the_user(run):
    """They take it when the first of them is used, which may be later."""
    torch.manual_seed(42)
    load(run[0]["folder"]).score("ab")
    seeded = []
    with mock.patch.object(torch.cuda, "manual_seed_all", seeded.append):
        load(run[0]["folder"]).score("ab")
    assert seeded[-1] == 42


@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_precisions_that_are_set_by_the_newer_names_are_left_too(run, backend):
    """torch refuses to give them by the older name."""
    matmul = getattr(torch.backends, backend).matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        load(run[0]["folder"]).score("ab")
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


# -- metrics ---------------------------------------------------------------------------------------------------------


LINES = """{"step": 1, "loss": 2.5, "lr/matrix": 0.1}
{"step": 1, "val_bits_per_byte": 3.0, "val_parts": {"prior": 0.5, "deep": {"er": "NaN"}}}
{"step": 2, "loss": "Infinity"}
{"step": 3, "lo"""


def test_metrics_are_columns(work, monkeypatch):
    (work / "runs" / "one" / "checkpoint-2").mkdir(parents=True)
    (work / "runs" / "one" / "metrics.jsonl").write_text(LINES)
    found = metrics("runs/one")
    assert list(found) == [
        "step",
        "loss",
        "lr/matrix",
        "val_bits_per_byte",
        "val_parts.prior",
        "val_parts.deep.er",
    ]
    assert found["step"] == [1, 1, 2] and found["loss"] == [2.5, None, math.inf]
    assert found["lr/matrix"] == [0.1, None, None] and found["val_parts.prior"] == [None, 0.5, None]
    assert math.isnan(found["val_parts.deep.er"][1])
    monkeypatch.setenv("HOME", str(work))
    for same in ("~/runs/one", Path("runs/one/metrics.jsonl"), work / "runs/one/checkpoint-2"):
        assert str(metrics(same)) == str(found)


def test_metrics_of_a_run_that_has_logged_nothing_yet(work):
    (work / "manifest.json").touch()
    assert metrics(work) == {}
    (work / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert metrics(work) == {}


def test_no_such_run(work):
    for name in ("outputs/gpt2-1", "checkpoints/dante"):
        (work / name).mkdir(parents=True)
        (work / name / "metrics.jsonl").touch()
    with pytest.raises(ValueError) as caught:
        metrics("dant")
    assert str(caught.value) == "no such run: dant. Runs nearby: checkpoints/dante, outputs/gpt2-1"
    with pytest.raises(
        ValueError,
        match="^outputs holds no metrics.jsonl, so it is no run folder. Runs nearby: outputs/gpt2-1",
    ):
        metrics("outputs")


def test_damaged_metrics_name_the_line(work):
    (work / "metrics.jsonl").write_text('{"step": 1}\nno\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON object: no"):
        metrics(work)


def test_metrics_become_a_table(run):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(metrics(run[0]["folder"]))
    assert table["step"].max() == 2 and table["val_bits_per_byte"].count() == 1


# -- in processes of their own -----------------------------------------------------------------------------------------


def python(code, folder, path=ROOT / "installed", **environment):
    """Run a program of somebody who has installed this: `mytrainer` is importable, nothing else of the project."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def test_what_is_installed_is_this_module_alone():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings == {"package-dir": {"": "installed"}, "py-modules": ["mytrainer"]}
    assert {p.name for p in (ROOT / "installed").glob("*.py")} == {"mytrainer.py"}
    folders = {p.name for p in (ROOT / "installed").iterdir() if p.is_dir()}
    assert folders <= {"__pycache__", "mytrainer.egg-info"}  # the second is what pip leaves


def test_every_public_name_says_what_it_is():
    assert mytrainer.__all__ == ["load", "metrics", "train"]
    for name in mytrainer.__all__:
        text = getattr(mytrainer, name).__doc__
        assert "Args:" in text and "Raises:" in text


@pytest.mark.slow
def test_importing_is_light_and_changes_but_the_end_of_the_path(work):
    (work / "mytrainer").mkdir()  # as where the project was cloned into it
    done = python(
        """
        import os, signal, sys, threading, warnings
        before = sorted(sys.modules), dict(os.environ), list(sys.path), list(warnings.filters), signal.getsignal(2)
        from mytrainer import load, metrics, train
        assert sys.path[:-1] == before[2] and sys.path[-1] == ROOT, sys.path
        assert (dict(os.environ), list(warnings.filters), signal.getsignal(2)) == (before[1], before[3], before[4])
        heavy = {"torch", "numpy", "hydra", "omegaconf", "pydantic", "rich", "data", "models", "configs", "trainer"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        assert threading.active_count() == 1
        """.replace("ROOT", repr(str(ROOT))),
        work,
    )
    assert done.returncode == 0, done.stderr
