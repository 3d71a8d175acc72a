"""In somebody else's process: names of modules are his, and ours while our code runs.

A process of a user is made of this one: what it has loaded of the project is out of sight, as after a first call. The
slow tests start real ones.
"""

import importlib
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import mytrainer_guest as guest

ROOT = Path(__file__).resolve().parents[1]
HERE = ("", str(ROOT), str(ROOT / "tests"))


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A folder at the beginning of the path of a user who has imported `mytrainer`."""
    before = guest._seen()
    for name in before:
        del sys.modules[name]
    monkeypatch.setattr(guest, "_ours", dict(before))
    monkeypatch.setattr(guest, "_added", False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    guest.settle(added=True)
    path = [entry for entry in sys.path if entry not in HERE and Path(entry) != ROOT]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *path, str(ROOT)])
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in guest._seen():
        del sys.modules[name]
    sys.modules.update(before)


def module(folder, name, text="MINE = True\n"):
    path = folder.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()


def test_names_are_the_users_before_and_after_and_ours_within(theirs):
    module(theirs, "data")
    mine = importlib.import_module("data")
    with guest.visit():
        ours = importlib.import_module("data")
        assert ours.SOURCES and not hasattr(ours, "MINE")
        with guest.visit():  # one call within another
            assert sys.modules["data"] is ours
        assert sys.modules["data"] is ours and sys.path[0] == str(ROOT)
    assert mine.MINE and sys.modules["data"] is mine and sys.path[0] == str(theirs)


def test_a_module_that_the_user_imports_after_a_call_is_his(theirs):
    module(theirs, "data.__init__")
    module(theirs, "data.store")
    with guest.visit():
        assert importlib.import_module("data.store").TokenStore
    assert importlib.import_module("data").MINE and importlib.import_module("data.store").MINE


def test_one_that_he_can_import_only_later_is_his_too(theirs):
    with guest.visit():
        importlib.import_module("models")
    module(theirs / "deep", "models")
    sys.path.insert(0, str(theirs / "deep"))
    assert importlib.import_module("models").MINE


def test_folders_without_init_are_his_where_they_hold_modules(theirs):
    module(theirs, "models.thing")
    assert importlib.import_module("models.thing").MINE
    with guest.visit():
        assert importlib.import_module("models").ARCHITECTURES
    assert importlib.import_module("models.thing").MINE


def test_where_he_has_none_the_name_is_ours_and_the_classes_are_the_same(theirs):
    with guest.visit():
        within = importlib.import_module("configs.schema").RunConfig
    schema = importlib.import_module("configs.schema")
    assert schema.RunConfig is within and schema.__spec__.origin == str(ROOT / "configs" / "schema.py")
    assert pickle.loads(pickle.dumps(within(type="gpt2"))) == within(type="gpt2")
    with guest.visit():
        assert sys.modules["configs.schema"] is schema
    assert sys.modules["configs.schema"] is schema, "what he has imported stays"


def test_ours_that_was_never_loaded_is_loaded_among_ours(theirs):
    """Though his own module has a name that it imports."""
    module(theirs, "configs")
    for name in [name for name in guest._ours if name.startswith("models")]:
        del guest._ours[name]
    assert importlib.import_module("models.gpt2").GPT2
    assert importlib.import_module("configs").MINE


def test_a_module_of_his_that_calls_us_while_it_is_imported(theirs):
    module(
        theirs,
        "data",
        "import mytrainer_guest\nwith mytrainer_guest.visit():\n    import data.rows\nMINE = True\n",
    )
    found = importlib.import_module("data")
    assert found.MINE and sys.modules["data"] is found and "data.rows" not in sys.modules


def test_an_exception_puts_everything_back(theirs):
    module(theirs, "trainer")
    mine = importlib.import_module("trainer")
    before = dict(os.environ)
    with pytest.raises(KeyError), guest.visit():
        os.environ["OF_A_CALL"] = "1"
        os.chdir("/")
        raise KeyError
    assert sys.modules["trainer"] is mine and dict(os.environ) == before and os.getcwd() == str(theirs)


def test_the_last_call_to_end_puts_things_back(theirs):
    """Calls on several threads overlap; all of them need our names."""
    module(theirs, "naming")
    mine = importlib.import_module("naming")
    inside, leave = threading.Event(), threading.Event()

    def long():
        with guest.visit():
            inside.set()
            leave.wait()
            found.append(importlib.import_module("naming"))

    found: list = []
    thread = threading.Thread(target=long)
    thread.start()
    inside.wait()
    with guest.visit():
        pass
    leave.set()
    thread.join()
    assert found[0] is not mine and found[0].Entry and sys.modules["naming"] is mine


def test_at_home_nothing_is_put_aside():
    """The command line and these tests have the project first on their path."""
    before = dict(sys.modules)
    with guest.visit():
        import trainer.commands.bench.baseline
    assert sys.modules["trainer.commands.bench.baseline"] is trainer.commands.bench.baseline
    assert all(sys.modules[name] is before[name] for name in before)


def test_every_public_method_of_a_class_is_a_visit(theirs):
    module(theirs, "data")
    mine = importlib.import_module("data")

    class Model:
        def look(self):
            """What it does."""
            return importlib.import_module("data")

        def _look(self):
            return importlib.import_module("data")

    guest.with_visits(Model)
    guest.with_visits(Model)
    assert Model().look() is not mine and Model()._look() is mine and Model.look.__doc__ == "What it does."


def test_the_gpu_that_a_run_computed_on_is_not_the_users(monkeypatch):
    current = [1]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: current.__setitem__(0, number))
    with guest._gpu():
        torch.cuda.set_device(3)
    assert current == [1]


# -- in processes of their own -----------------------------------------------------------------------------------------

TINY = [
    "model=gpt2",
    "preset=none",
    "data=synthetic",
    "synthetic_bytes=20000",
    "train_seq_len=32",
    "global_batch_size=4",
    "num_iterations=2",
    "val_loss_every=0",
    "val_bytes=500",
    "sample_tokens=0",
    "device=cpu",
    "mixed_precision=no",
    *(f"model_cfg.{name}" for name in ("d_model=32", "n_layers=1", "n_heads=2", "n_ctx=32")),
]


def program(folder, text, *words, status=0):
    """A script of a user who has installed this: `mytrainer` is importable, nothing else of the project."""
    (folder / "script.py").write_text(textwrap.dedent(text))
    done = subprocess.run(
        [sys.executable, "script.py", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "installed")},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("first", ["mytrainer", "his own"])
def test_a_project_with_the_same_names(tmp_path, first):
    module(tmp_path, "data")
    module(tmp_path, "models.__init__")
    module(tmp_path, "models.gpt2")
    module(tmp_path, "configs.own")
    his = "import data, models.gpt2, configs.own"
    ours = "from mytrainer import load, metrics, train"
    program(
        tmp_path,
        f"""
        import sys
        {his if first == "his own" else ours}
        {ours if first == "his own" else his}
        assert data.MINE and models.gpt2.MINE and configs.own.MINE
        mine = [sys.modules[name] for name in ("data", "models", "models.gpt2", "configs.own")]
        run = train({TINY})
        model = load(run["folder"])
        nats = model.score("some text").nats
        model.generate("a", max_new_tokens=2)
        assert len(metrics(run["folder"])["step"]) == 2
        assert mine == [sys.modules[name] for name in ("data", "models", "models.gpt2", "configs.own")]
        import models.gpt2 as again
        assert again is models.gpt2 and "trainer" not in sys.modules
        """,
    )


@pytest.mark.slow
def test_processes_of_a_run_and_what_one_of_them_could_not_do(tmp_path):
    """They find the project first, and the user's own architecture where he finds it."""
    module(tmp_path, "data")
    module(
        tmp_path / "elsewhere", "own_package.arch", "from models.gpt2 import GPT2\nclass Mine(GPT2): pass\n"
    )
    (tmp_path / "mine.yaml").write_text("defaults: [gpt2, _self_]\ntype: 'own_package.arch:Mine'\n")
    done = program(
        tmp_path,
        f"""
        import sys, data
        sys.path.append({str(tmp_path / "elsewhere")!r})
        from mytrainer import load, train
        two = ["num_gpus=2", *{[word.replace("gpt2", "mine.yaml") for word in TINY]}]
        run = train(two)
        assert run["steps"] == 2 and data.MINE
        assert load(run["folder"], trust="own_package").score("ab").nats.shape == (2,)
        print("MADE")
        for wrong in (["learning_rate=1e38", "max_grad_norm=0"], ["num_epochs=0.0001"]):
            try:
                train([*two, *wrong])
            except (RuntimeError, ValueError) as error:
                print("RAISED", type(error).__name__, error)
        """,
    )
    assert "MADE" in done.stdout
    raised = [line for line in done.stdout.splitlines() if line.startswith("RAISED")]
    assert raised[0].startswith("RAISED TrainingError step ") and "is not finite" in raised[0]
    assert raised[1].startswith("RAISED ValueError num_epochs=0.0001 is less than one step")
    assert "is not finite" not in done.stderr and "less than one step" not in done.stderr


@pytest.mark.slow
def test_a_hydra_application_of_the_users_goes_on(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("size: 3\n")
    done = program(
        tmp_path,
        f"""
        import logging, hydra
        from hydra.core.config_store import ConfigStore
        from hydra.core.hydra_config import HydraConfig
        from mytrainer import train
        ConfigStore.instance().store(name="stored", group="configs", node={{"of": "his"}})

        @hydra.main(version_base=None, config_path="conf", config_name="config")
        def main(cfg):
            before = HydraConfig.get().job.name, logging.root.handlers[:], set(ConfigStore.instance().repo)
            run = train({TINY})
            assert before == (HydraConfig.get().job.name, logging.root.handlers, set(ConfigStore.instance().repo))
            assert list(ConfigStore.instance().repo["configs"]) == ["stored.yaml"]
            print("SCORED", cfg.size, run["steps"])

        main()
        """,
        "size=4",
        "hydra.run.dir=his",
    )
    assert "SCORED 4 2" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "status"), [("SIGINT", 0), ("SIGTERM", -15)])
@pytest.mark.parametrize("processes", [1, 2])
def test_who_is_asked_to_stop_saves_and_then_does_as_he_would(tmp_path, asked, status, processes):
    done = program(
        tmp_path,
        f"""
        import os, pathlib, signal, threading, time
        from mytrainer import train

        def ask():
            while not list(pathlib.Path("out").glob("metrics.jsonl")):
                time.sleep(0.05)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.{asked})

        threading.Thread(target=ask).start()
        more = ["num_gpus={processes}", "output_dir=out", "num_iterations=1000000", "logging_steps=1"]
        try:
            train([*{TINY}, *more])
        except KeyboardInterrupt as stopped:
            print("STOPPED", stopped)
        """,
        status=status,
    )
    assert ("STOPPED stopped; go on with: train(['resume=" in done.stdout) == (asked == "SIGINT")
    assert list((tmp_path / "out").glob("checkpoint-*"))


def test_a_switch_that_is_as_it_should_be_is_left_alone(monkeypatch):
    """It imports torch's compiler: seconds, in which an interrupt leaves half of it behind."""

    def moved(*args, **kwargs):
        raise AssertionError("torch.use_deterministic_algorithms was called")

    monkeypatch.setattr(torch, "use_deterministic_algorithms", moved)
    with guest.numerics():
        assert not torch.are_deterministic_algorithms_enabled()
