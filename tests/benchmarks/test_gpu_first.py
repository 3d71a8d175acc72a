"""The script for the first hour with a GPU: its commands are understood, and what fails does not stop the rest."""

import json
import subprocess

import pytest

from benchmarks import gpu_first
from benchmarks.gpu_first import Part, Step, steps
from configs.compose import check, compose_tree, prepare
from models import ARCHITECTURES

pytest_plugins = ["pytester"]
NAMES = sorted(steps("cpu", True, gpu_first.ROOT))


def words_of(part):
    """What Hydra reads of a command."""
    if part.command[1] == "mytrainer.py":
        words = part.command[2:]
        return words if "bench" not in words else None
    return ["--hydra_model_cfg=configs/gpt2.yaml", *part.command[4:]] if "host_syncs" in part.name else None


def test_what_it_trains_is_a_configuration(tmp_path):
    parts = [part for step in steps("cpu", False, tmp_path).values() for part in step.parts]
    checked = 0
    for words in filter(None, map(words_of, parts)):
        words = [word for word in words if not word.startswith("resume=")]
        if not any(word.startswith("--hydra_model_cfg") for word in words):
            words.insert(0, "--hydra_model_cfg=configs/gpt2.yaml")
        plan = prepare(words)
        check(plan, compose_tree(plan.overrides))
        checked += 1
    assert checked == 6


def test_every_architecture_is_measured(tmp_path):
    known = steps("cuda", False, tmp_path)
    types = {
        type_ for name in ("6a", "6b") for part in known[name].parts for type_ in part.command[4].split(",")
    }
    assert types == set(ARCHITECTURES) - {"memory_adapter"}, "which needs a base"


def test_beginnings_of_names_mean_all_of_them(capsys):
    assert gpu_first._chosen(["4", "2"], dict.fromkeys(["2", "3", "4a", "4b"])) == ["4a", "4b", "2"]
    with pytest.raises(SystemExit, match="step '9': not one of all, 2, 3"):
        gpu_first._chosen(["9"], dict.fromkeys(["2", "3"]))


def test_what_fails_is_listed_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    good, silent = tmp_path / "good.json", tmp_path / "silent.json"
    parts = [
        Part("breaks", ["break"]),
        Part("hangs", ["hang"]),
        Part("silent", ["say nothing"], silent),
        Part("good", ["measure"], good),
    ]

    def run(command, *, stdout, timeout, **_):
        assert 1 < timeout <= gpu_first.SECONDS
        stdout.write(f"{command[0]}ing\n")
        stdout.flush()
        if command == ["hang"]:
            raise subprocess.TimeoutExpired(command, timeout)
        if command == ["measure"]:
            good.write_text('{"seconds": 3}')
        return subprocess.CompletedProcess(command, int(command == ["break"]))

    monkeypatch.setattr(gpu_first, "collect_environment", lambda device: {"device": "none"})
    monkeypatch.setattr(gpu_first.subprocess, "run", run)
    monkeypatch.setattr(gpu_first, "steps", lambda *_: {"1": Step("all kinds", parts)})
    assert gpu_first.main(["1", "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out/1.json").read_text())
    assert [part["status"] for part in found["parts"]] == ["exit 1", "out of time", "no figures", "done"]
    assert found["parts"][0]["output"] == "breaking\n" and found["parts"][3]["figures"] == {"seconds": 3}
    assert found["environment"] == {"device": "none"} and found["parts"][3]["command"] == "measure"
    assert "1 breaks: exit 1, see" in out and "good:" not in out.partition("failed:")[2]
    assert "$ hang\nhanging\n" in (tmp_path / "out/1.log").read_text()


def test_a_step_without_time_left_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_first, "SECONDS", 0)
    assert gpu_first._run("1", Step("late", [Part("late", ["x"])]), tmp_path, {}) == [
        f"   1 late: no time left, see {tmp_path / '1.log'}"
    ]


def test_a_step_without_commands_leaves_its_file(tmp_path):
    assert gpu_first._run("5c", Step("nothing on a CPU", []), tmp_path, {}) == []
    assert json.loads((tmp_path / "5c.json").read_text())["parts"] == []


def test_tests_are_known_before_all_are_done(tmp_path, pytester, monkeypatch):
    """A step that is stopped keeps the results so far, and why one failed."""
    file = tmp_path / "tests.jsonl"
    pytester.makepyfile(
        """
        import json, os, pytest
        def test_a(): pass
        def test_b(): assert 1 == 2, "no"
        @pytest.mark.skip
        def test_c(): pass
        def test_d():
            lines = open(os.environ["LINES"]).read().splitlines()
            assert {json.loads(line)["test"][-6:] for line in lines} == {"test_a", "test_b", "test_c", "test_d"}
        """
    )
    monkeypatch.setenv("LINES", str(file))
    pytester.inline_run("-p", "benchmarks.pytest_results", "--results", str(file))
    found = gpu_first._figures(file)
    assert found.pop("seconds") > 0
    assert found == {
        "tests": 4,
        "skipped": 1,
        "failed": {"test_tests_are_known_before_all_are_done.py::test_b": "AssertionError: no"},
    }
    assert gpu_first._figures(tmp_path / "none.jsonl") is None


def test_no_test_that_needs_a_gpu_is_forgotten(tmp_path):
    known = steps("cuda", False, tmp_path)
    (small,), (large,), (others,) = (known[name].parts for name in ("1c", "1d", "1e"))
    *_, path, _, chosen = small.command
    assert large.command[-3:] == [path, "-k", f"not {chosen}"]
    assert others.command[-1] == f"--ignore={path}"
    assert all("gpu" in part.command for part in (small, large, others))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_of_it_runs_at_tiny_size(name, tmp_path):
    script = gpu_first.ROOT / "benchmarks" / "gpu_first.sh"
    command = [script, name, "--device", "cpu", "--tiny", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "nothing failed" in done.stdout, done.stdout + done.stderr
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert all(part["figures"] is not None for part in found["parts"])
