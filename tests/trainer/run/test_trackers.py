"""Trackers: what they are sent, each step once whatever happens, and that none of them can hurt a run."""

import json
import os
import subprocess
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from configs.compose import compose
from configs.messages import ConfigError
from tests.contract.tiny import config, overrides
from tests.house_copy import Edit, edited_copy
from trainer.loop import train
from trainer.run import TRACKERS, TrackerEntry, background
from trainer.run.background import InBackground
from trainer.run.facts import Facts
from trainer.run.trackers import TensorBoard, Wandb, numbers

SHORT = ["num_iterations=2", "logging_steps=1", "val_loss_every=0", "val_bytes=500", "sample_tokens=0"]


def facts(path, step=0, **fields):
    settings = {"use_wandb": "offline", "wandb_project": "mytrainer", "wandb_run_name": None, **fields}
    return Facts(path, step, settings, {}, [], [])


def line(step, **values):
    return {"step": step, "tokens": 100 * step, "loss": 5.0 - step, **values}


def module(monkeypatch, name, **contents):
    """A package of somebody else, replaced for the length of a test."""
    fake = ModuleType(name)
    fake.__spec__ = ModuleSpec(name, None)
    fake.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, fake)
    return fake


@pytest.fixture
def wandb(monkeypatch):
    """W&B as we use it; `runs`: one per `init`, in order."""
    runs = []

    class Run(SimpleNamespace):
        def log(self, values):
            self.rows.append(values)

        def define_metric(self, name, **options):
            self.defined.append((name, options))

        def finish(self):
            self.finished = True

    def init(**options):
        runs.append(Run(options=options, rows=[], defined=[], summary={}, finished=False))
        return runs[-1]

    return module(monkeypatch, "wandb", init=init, Settings=dict, runs=runs)


@pytest.fixture
def writers(monkeypatch):
    """TensorBoard's writers as we use them, in the order in which they were made."""
    made = []

    class SummaryWriter:
        def __init__(self, path, purge_step):
            self.path, self.purge_step, self.values, self.closed = path, purge_step, [], False
            made.append(self)

        def add_scalar(self, name, value, step):
            self.values.append((name, value, step))

        def close(self):
            self.closed = True

    module(monkeypatch, "tensorboard")
    module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    return made


# -- what they are sent ------------------------------------------------------------------------------------------------


def test_numbers_are_what_can_be_drawn():
    found = numbers({"loss": 1.5, "n": 2, "kind": "exact", "flag": True, "none": None, "parts": {"a": 0.5}})
    assert found == {"loss": 1.5, "n": 2, "parts/a": 0.5}


def test_wandb_gets_the_configuration_the_lines_and_the_score(tmp_path, wandb):
    tracker = Wandb()
    tracker.begin(facts(tmp_path / "my-run", wandb_project="house", use_wandb="online"))
    tracker.step(line(10))
    tracker.evaluation({"step": 10, "val_bits_per_byte": 2.5, "val_kind": "exact"})
    tracker.finish({"type": "gpt2", "score": {"bits_per_byte": 2.5}})
    tracker.close()
    (run,) = wandb.runs
    assert (run.options["project"], run.options["name"], run.options["mode"]) == ("house", "my-run", "online")
    assert run.options["config"]["wandb_project"] == "house" and run.options["settings"]["silent"] is True
    assert run.rows == [{"step": 10, "tokens": 1000, "loss": -5.0}, {"step": 10, "val_bits_per_byte": 2.5}]
    assert ("*", {"step_metric": "step"}) in run.defined
    assert run.summary == {"score/bits_per_byte": 2.5} and run.finished


def test_after_a_resume_wandb_goes_on_with_the_same_run_and_sends_no_step_twice(tmp_path, wandb):
    first, second, other = Wandb(), Wandb(), Wandb()
    first.begin(facts(tmp_path))
    for step in (10, 20, 30):
        first.step(line(step))
    first.evaluation({"step": 20, "val_bits_per_byte": 3.0})
    # Killed before 30 was scored; the last checkpoint is that of 10.
    second.begin(facts(tmp_path, step=10))
    for step in (20, 30, 40):
        second.step(line(step))
        second.evaluation({"step": step, "val_bits_per_byte": 3.0})
    other.begin(facts(tmp_path / "other"))
    ids = [run.options["id"] for run in wandb.runs]
    assert ids[0] == ids[1] != ids[2]
    sent = [(row["step"], key) for run in wandb.runs for row in run.rows for key in row if key != "step"]
    assert sorted(sent) == sorted(
        (step, key)
        for step in (10, 20, 30, 40)
        for key in ("tokens", "loss", "val_bits_per_byte")
        if (step, key) != (10, "val_bits_per_byte")
    )


def test_tensorboard_gets_every_number_and_purges_what_comes_again(tmp_path, writers):
    for step, steps in ((0, (10, 20)), (10, (20, 30))):
        tracker = TensorBoard()
        tracker.begin(facts(tmp_path, step=step))
        for at in steps:
            tracker.step(line(at))
        tracker.evaluation({"step": at, "val_bits_per_byte": 2.0})
        tracker.close()
    first, second = writers
    assert first.path == second.path == str(tmp_path / "tensorboard")
    assert (first.purge_step, second.purge_step) == (1, 11)
    assert first.values[:2] == [("tokens", 1000, 10), ("loss", -5.0, 10)]
    assert second.values[-1] == ("val_bits_per_byte", 2.0, 30) and second.closed


# -- none of them can hurt ---------------------------------------------------------------------------------------------


class Recorder:
    """A sink that keeps what it is told, and may misbehave in one place."""

    def __init__(self, misbehave=None, where=""):
        self.calls, self.misbehave, self.where = [], misbehave, where

    def __getattr__(self, name):
        def told(*arguments):
            self.calls.append((name, *arguments))
            if name == self.where:
                self.misbehave()

        return told


def fail():
    raise SystemExit("no such account\nand more")


def drive(sink, lines=3):
    notes = []
    behind = InBackground("toy", sink, notes.append)
    started = time.monotonic()
    behind.begin("facts")
    for step in range(lines):
        behind.step({"step": step})
    behind.evaluation({"step": lines})
    behind.finish({"steps": lines})
    behind.close()
    return notes, time.monotonic() - started


def test_everything_arrives_in_order_before_the_run_ends():
    sink = Recorder()
    assert drive(sink)[0] == []
    assert [name for name, *_ in sink.calls] == ["begin", *["step"] * 3, "evaluation", "finish", "close"]
    assert sink.calls[0] == ("begin", "facts") and sink.calls[2] == ("step", {"step": 1})


@pytest.mark.parametrize("where", ["begin", "step", "evaluation", "finish", "close"])
def test_one_that_raises_is_dropped_with_one_note(where):
    sink = Recorder(fail, where)
    (note,), _ = drive(sink)
    assert note.startswith("toy: SystemExit: no such account. The run goes on without it")
    assert sink.calls[-1][0] == where


@pytest.mark.parametrize("where", ["begin", "step", "close"])
def test_one_that_hangs_is_left_behind(monkeypatch, where):
    monkeypatch.setattr(background, "PATIENCE", 0.05)
    never = threading.Event()
    (note,), seconds = drive(Recorder(never.wait, where))
    never.set()
    assert "not done 0.05 seconds after the run" in note
    assert seconds < 1


def test_one_that_is_too_slow_is_dropped_while_the_run_goes_on(monkeypatch):
    monkeypatch.setattr(background, "MOST_WAITING", 4)
    never = threading.Event()
    (note,), seconds = drive(Recorder(never.wait, "step"), lines=100)
    never.set()
    assert "it is 4 lines behind" in note and seconds < 1


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_a_run_sends_every_line_of_its_metrics_once_over_two_lives(tmp_path, wandb, writers):
    on = [*SHORT, "use_wandb=true", "use_tensorboard=true", "save_steps=1", f"output_dir={tmp_path}"]
    train(*config("gpt2", *on), tmp_path)
    train(*config("gpt2", *on, "num_iterations=3", "resume=auto"), tmp_path)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [at["step"] for at in lines if "loss" in at] == [1, 2, 3]
    expected = [(at["step"], key) for at in lines for key in numbers(at) if key != "step"]
    assert [run.options["mode"] for run in wandb.runs] == ["online", "online"]
    assert [
        (row["step"], key) for run in wandb.runs for row in run.rows for key in row if key != "step"
    ] == expected
    assert [(step, key) for writer in writers for key, _, step in writer.values] == expected
    assert all(run.finished and run.summary["score/bits_per_byte"] > 0 for run in wandb.runs)


def test_a_run_outlives_its_trackers(tmp_path, monkeypatch, capsys, wandb, writers):
    """The first has no key, the second a disk that does not answer."""
    monkeypatch.setattr(background, "PATIENCE", 0.05)
    wandb.init = lambda **options: fail()
    never = threading.Event()
    sys.modules["torch.utils.tensorboard"].SummaryWriter = lambda *a, **k: never.wait()
    cfg = config("gpt2", *SHORT, "use_wandb=online", "use_tensorboard=true", f"output_dir={tmp_path}")
    score = train(*cfg, tmp_path)
    never.set()
    out = capsys.readouterr().out
    assert out.count("wandb: SystemExit: no such account. The run goes on without it") == 1
    assert out.count("tensorboard: it was not done") == 1
    assert json.loads((tmp_path / "summary.json").read_text())["score"]["bits_per_byte"] == score


def test_one_that_is_not_installed_is_said_before_anything_starts(monkeypatch):
    monkeypatch.setattr("configs.validate.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        config("gpt2", "use_wandb=offline", "use_tensorboard=true")
    said = error.value.report()
    for name in ("wandb", "tensorboard"):
        assert (
            f"use_{name}: {name} is not installed. pip install -e '.[{name}]', or set use_{name}=false"
            in said
        )
    config("gpt2")  # off: nothing is asked for


def test_other_spellings_and_modes(wandb):
    for words, mode in (
        (["use_wandb=true"], "online"),
        (["log_to_wandb=true"], "online"),
        (["wandb_log=offline"], "offline"),
        (["use_wandb=false"], False),
    ):
        assert config("gpt2", *words)[0].use_wandb == mode
    with pytest.raises(ConfigError, match="use_wandb: 'onlin' is not one of .* Did you mean 'online'"):
        config("gpt2", "use_wandb=onlin")


def test_what_a_tracker_that_is_off_does_not_read_is_said(wandb):
    def said(*words):
        notices = []
        compose([*overrides("gpt2"), *words], notify=notices.append)
        return [text for text in notices if "not read" in text]

    off = "not read by this run: wandb_project (because of use_wandb=false)"
    assert said("wandb_project=mine") == [off]
    assert said("wandb_project=mine", "use_wandb=offline") == said() == []


def test_a_tracker_is_added_by_a_row(tmp_path, monkeypatch):
    """A module and a row, here behind the switch of another."""
    toy = Recorder()
    module(monkeypatch, "toy_tracker", Toy=lambda: toy)
    monkeypatch.setitem(TRACKERS, "toy", TrackerEntry("toy_tracker:Toy", switch="use_tensorboard"))
    monkeypatch.delitem(TRACKERS, "tensorboard")
    train(*config("gpt2", *SHORT, "use_tensorboard=true", f"output_dir={tmp_path}"), tmp_path)
    names = [name for name, *_ in toy.calls]
    assert names == ["begin", "step", "step", "evaluation", "finish", "close"]
    assert toy.calls[0][1].config["type"] == "gpt2" and toy.calls[0][1].path == tmp_path


# -- the real ones -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tracker_of_ones_own_is_what_the_guide_says(tmp_path):
    """A copy of the project plus the three edits of CONTRIBUTING.md: a class, a row, a line each in schema and YAML."""
    lines_of = (
        "from trainer.run.sinks import MetricsSink\n\n\n"
        "class LinesOf(MetricsSink):\n"
        "    def begin(self, facts):\n"
        "        self.file = open(facts.path / facts.config['lines_file'], 'a')\n\n"
        "    def step(self, line):\n"
        "        print(line['step'], file=self.file, flush=True)\n\n"
        "    evaluation = step\n"
    )
    row = '    "lines": TrackerEntry("trainer.run.lines_of:LinesOf", ("lines_file",), switch="use_lines"),\n'
    edits: list[Edit] = [
        ("trainer/run/lines_of.py", None, lines_of),
        ("trainer/run/__init__.py", "TRACKERS: dict[str, TrackerEntry] = {", row),
        (
            "configs/schema.py",
            "    use_tensorboard: bool",
            '    use_lines: bool = False\n    lines_file: str = "lines"\n',
        ),
        ("configs/training.yaml", "sample_prompt:", "use_lines: false\nlines_file: lines\n"),
    ]
    house = edited_copy(tmp_path, edits)

    def run(*words):
        command = [sys.executable, "mytrainer.py", *overrides("gpt2", *SHORT, "output_dir=out", *words)]
        done = subprocess.run(command, cwd=house, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "not read" not in run("use_lines=true", "lines_file=steps")
    assert (house / "out/steps").read_text() == "1\n2\n2\n"
    said = run("output_dir=other", "lines_file=steps")
    assert "lines_file (because of use_lines=false)" in said and not (house / "other/steps").exists()


@pytest.mark.slow
def test_real_tensorboard_shows_each_step_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step, steps in ((0, (10, 20, 30)), (10, (20, 30, 40))):
        tracker = TensorBoard()
        tracker.begin(facts(tmp_path, step=step))
        for at in steps:
            tracker.step(line(at))
        tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (10, -5.0),
        (20, -15.0),
        (30, -25.0),
        (40, -35.0),
    ]


@pytest.mark.slow
def test_real_wandb_offline_and_online_without_a_key(tmp_path):
    """In a process of its own, which must end: W&B hooks into the end of a process."""
    pytest.importorskip("wandb")
    code = (
        "import sys; from pathlib import Path; from tests.contract.tiny import config; from trainer.loop import train\n"
        "folder = Path(sys.argv[1]); train(*config('gpt2', f'output_dir={folder}', *sys.argv[2:]), folder)\n"
    )
    env = {k: v for k, v in os.environ.items() if "WANDB" not in k} | {"HOME": str(tmp_path)}
    for mode, note in (("offline", None), ("online", "wandb: UsageError: No API key configured")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / mode), *SHORT, f"use_wandb={mode}"],
            capture_output=True,
            text=True,
            env=env,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        assert (note in done.stdout) if note else ("wandb: " not in done.stdout + done.stderr)
    assert list((tmp_path / "offline/wandb").glob("offline-run-*/run-*.wandb"))
    assert json.loads((tmp_path / "offline/wandb.json").read_text())["sent"]["loss"] == 2
    assert not (tmp_path / "online/wandb.json").exists()
