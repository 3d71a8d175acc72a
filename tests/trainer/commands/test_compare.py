"""The `compare` command, as a user types it."""

from __future__ import annotations

import json
import shutil

import pytest

import mytrainer
from configs.schema import RunConfig
from tests.old_runs.make import EXPECTED, unpack
from tests.trainer.view.runs_made_up import made_up
from trainer.sweep.jobs import Job


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_up(tmp_path / "outputs/a", bits=2.5)
    made_up(tmp_path / "outputs/b", bits=2.25)
    return tmp_path


@pytest.fixture
def compare(capsys, monkeypatch):
    def call(*words):
        monkeypatch.setenv("PYTHONPATH", "")
        status = mytrainer.main(["compare", *words])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_it_writes_the_page_and_markdown_and_prints_the_scores(here, compare):
    status, out, err = compare("outputs/a", "outputs/b/checkpoint-10")
    assert (status, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["run", "bits", "per", "byte"],
        ["b", "2.250"],
        ["a", "2.500"],
        ["compare.html", "and", "compare.md"],
    ]
    page = (here / "compare.html").read_text()
    assert "<title>2 runs: 2.250 bits per byte at best</title>" in page
    assert (here / "compare.md").read_text().startswith("<!-- mytrainer compare -->")
    assert compare("outputs/a", "outputs/b")[0] == 0, "what it wrote itself it writes anew"


def test_json_has_every_point_and_writes_nothing_unless_told_to(here, compare):
    status, out, _ = compare("outputs/a", "outputs/b", "--json")
    found = json.loads(out)
    assert status == 0 and not list(here.glob("compare.*"))
    best = found["runs"][0]
    assert (best["name"], best["parameters"]["by_role"]) == ("b", {"matrix": 60, "scalar": 10})
    assert (best["flops_per_byte"], best["generation_tokens_per_second"], best["entropy"]) == (
        32.0,
        31.0,
        1.5,
    )
    assert len(best["training"]["bits_per_byte"]) == 40 and best["training"]["flops"][-1] == 256_000
    assert best["held_out"]["bytes"] == [2000, 4000, 6000, 8000]
    compare("outputs/a", "outputs/b", "--json", "--output", "other.html")
    assert (here / "other.html").exists() and (here / "other.md").exists()


def test_a_sweep_stands_for_its_runs(here, compare):
    for number in range(3):
        folder = made_up(here / f"multirun/x/{number}", bits=2.0 + number)
        job = Job.new(folder, folder, RunConfig(type="gpt2", seed=number, model_cfg={"d_model": 64}))
        job.begin()
        job.end("failed" if number == 2 else "ok", "step 3 is not finite" if number == 2 else "")
    (here / "multirun/x/multirun.yaml").write_text("hydra: {}")
    status, out, _ = compare("multirun/x", "outputs/a")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["0", "a", "1", "2"]
    assert "failed: step 3 is not finite" in out
    assert "\nx/1 " in compare("outputs/a", "multirun/x/1")[1]
    status, _, err = compare("multirun/x", "multirun/x/1")
    assert status == 2 and "multirun/x/1 is given 2 times. Leave one of them out" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["outputs/a", "outputs/c"], "outputs/c is not there. Did you mean 'outputs/"),
        (["outputs/a", "empty"], "empty holds no run (no manifest.json, no metrics.jsonl), and no sweep"),
        (
            ["outputs/a", "outputs"],
            "outputs holds no run (no manifest.json, no metrics.jsonl), and no sweep. Runs in it: ",
        ),
        (
            ["outputs/a", "outputs/a/summary.json"],
            "outputs/a/summary.json is a file; the folder of a run is needed",
        ),
        (["outputs/a", "begun"], "begun has no score yet. Go on with it: python mytrainer.py resume=begun"),
        (["outputs/a", "outputs/b", "./outputs/a"], "outputs/a is given 2 times. Leave one of them out"),
        (["outputs/a", "linked"], "outputs/a is given 2 times. Leave one of them out"),
        (["outputs/a"], "outputs/a is one run, and a comparison takes two or more"),
        (["outputs/a", "damaged"], "damaged/summary.json is damaged: Expecting value"),
        (["outputs/a", "strange"], "strange/manifest.json is damaged: its data is no object"),
        (["outputs/a", "torn"], "torn/metrics.jsonl:2: not a JSON object: what"),
        (
            ["outputs/a", "outputs/b", "--output", "x.pdf"],
            "--output x.pdf: the page ends in .html. Nearest: x.html",
        ),
        (["outputs/a", "outputs/b", "--output", "no/x.html"], "there is no folder no"),
        (["outputs/a", "outputs/b", "--output", "mine.html"], "mine.md is there already, and no comparison"),
    ],
)
def test_a_mistake_gets_one_message_and_writes_nothing(here, compare, words, message):
    (here / "empty").mkdir()
    made_up(here / "begun", points=5)
    (here / "begun/summary.json").unlink()
    (here / "linked").symlink_to(here / "outputs/a")
    made_up(here / "damaged")
    (here / "damaged/summary.json").write_text("{")
    made_up(here / "strange", manifest={"data": ["a"]})
    made_up(here / "torn")
    lines = (here / "torn/metrics.jsonl").read_text().splitlines()
    (here / "torn/metrics.jsonl").write_text("\n".join([lines[0], "what", *lines[1:]]))
    (here / "mine.md").write_text("my notes")
    (here / "damaged/summary.json").write_text("oh")
    before = sorted(path.name for path in here.iterdir())
    status, out, err = compare(*words)
    assert (status, out) == (2, "") and message in err and err.count("\n") <= 2
    assert sorted(path.name for path in here.iterdir()) == before


def test_runs_of_earlier_code_compare(tmp_path, monkeypatch, compare):
    monkeypatch.chdir(tmp_path)
    types = sorted(json.loads(EXPECTED.read_text()))
    for type_ in types:
        shutil.rmtree(unpack(type_, tmp_path) / "checkpoint-4")
    status, out, _ = compare(*types, "--json")
    runs = json.loads(out)["runs"]
    assert status == 0 and sorted(run["name"] for run in runs) == types
    for run in runs:
        assert not run["apart"] and run["parameters"]["by_role"] and run["flops_per_byte"] > 0
        assert run["generation_tokens_per_second"] is None and run["entropy"] == pytest.approx(
            3.594, abs=1e-3
        )
        # Earlier lines of bounds have no bits per byte in training.
        found = [run["held_out"]["flops"], *([run["training"]["flops"]] if run["training"] else [])]
        assert len(found[0]) == 2 and all(None not in values for values in found)
    assert all(run["training"] for run in runs if run["score"]["kind"] == "exact")
