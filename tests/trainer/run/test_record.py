"""What a run writes of what its adapter reports: names, metrics, operations, parameters that act."""

import json
import mmap
import os
import sys

import numpy as np
import pytest
import torch

from adapters.base import StepOutput
from configs.trust import trusting
from tests.contract.tiny import adapter_of, config
from tests.trainer.run.reporting_toy import Reporting
from trainer.commands.show import describe
from trainer.loop import train
from trainer.run import manifest
from trainer.run.lines import is_own_name, refuse_taken_names
from trainer.run.progress import Progress

FEW = ["num_iterations=3", "val_loss_every=2", "logging_steps=2", "sample_tokens=0", "batch_size=2"]


def of(adapter, *more):
    return config("vanilla", f'model_adapter="tests.trainer.run.reporting_toy:{adapter}"', *FEW, *more)


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    path = tmp_path_factory.mktemp("reported")
    train(*of("Reporting", f"output_dir={path}", "save_steps=1"), path)
    return path


def test_metrics_stand_in_their_lines(reported):
    training = [line for line in lines(reported) if "loss" in line]
    assert [line["step"] for line in training] == [2, 3]
    assert [line["depth"] for line in training] == [2.5, 4.0], "means over the steps since the last line"
    assert (training[0]["load_0"], training[0]["load_1"]) == (0.0, 2.0)
    scored = [line for line in lines(reported) if "val_bits_per_byte" in line]
    assert [line["val_depth"] for line in scored] == [pytest.approx(7.0)] * 2
    score = json.loads((reported / "summary.json").read_text())["score"]
    assert score["metrics"] == {"depth": pytest.approx(7.0)} and "val_metrics" not in scored[0]


def test_the_report_charts_them(reported):
    page = (reported / "report.html").read_text()
    for title in ("depth", "load, training"):
        assert page.count(f"<figcaption><b>{title}</b>") == 1
    assert page.count('data-name="held out"') == 3 * 3, "of bits per byte, loss and depth, over three axes"


def test_operations_are_counted_as_they_were(reported):
    assert [line["flops"] for line in lines(reported) if "loss" in line] == [2 * 4 * 1000, 3 * 4 * 1000]
    assert json.loads((reported / "summary.json").read_text())["flops"] == 3 * 4 * 1000
    assert "FLOPs planned" in (reported / "report.html").read_text()


def test_operations_between_two_log_lines_are_not_lost_over_a_resume(reported, tmp_path):
    """The checkpoint of step 1 lies between two log lines."""
    (tmp_path / "checkpoint-1").symlink_to(reported / "checkpoint-1")
    with trusting("tests.trainer.run.reporting_toy"):
        train(*of("Reporting", f"output_dir={tmp_path}", "resume=auto", "save_checkpoint=false"), tmp_path)
    again, once = ([line["flops"] for line in lines(p) if "loss" in line] for p in (tmp_path, reported))
    assert again == once


def test_a_score_says_what_was_spent_until_then_also_between_log_lines(tmp_path):
    train(*of("Reporting", f"output_dir={tmp_path}", "logging_steps=3", "sample_tokens=4"), tmp_path)
    (trained,) = [line for line in lines(tmp_path) if "loss" in line]
    early, late = [line for line in lines(tmp_path) if "val_bits_per_byte" in line]
    assert (early["step"], early["flops"]) == (2, 2 * 4 * 1000) and 0 < early["bytes"] < late["bytes"]
    assert {key: late[key] for key in ("flops", "bytes", "tokens")} == {
        key: trained[key] for key in ("flops", "bytes", "tokens")
    }
    summary, manifest = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("summary", "manifest")
    )
    assert summary["generation_tokens_per_second"] > 0 and manifest["began"] < summary["ended"]


def test_active_parameters_stand_beside_the_total(reported):
    counts = json.loads((reported / "manifest.json").read_text())["parameters"]
    assert counts["active"] == 1234 < counts["total"] == sum(counts["by_role"].values())
    summary = json.loads((reported / "summary.json").read_text())
    assert summary["parameters"] == counts and summary["generation_tokens_per_second"] is None
    assert "<dt>active per token</dt><dd>1.23k</dd>" in (reported / "report.html").read_text()
    assert describe(*of("Reporting"))["parameters"]["active"] == 1234
    assert "active" not in describe(*config("vanilla"))["parameters"]


def test_the_console_shows_what_the_adapter_asks_for(tmp_path, capsys):
    train(*of("Reporting", f"output_dir={tmp_path}", "val_bytes=500"), tmp_path)
    out = capsys.readouterr().out
    assert ", 1,234 active per token (" in out
    assert "depth        2.5" in out and "load" not in out


def test_without_a_count_the_plan_counts(tmp_path):
    train(*config("gpt2", *FEW, f"output_dir={tmp_path}"), tmp_path)
    planned = json.loads((tmp_path / "manifest.json").read_text())["flops_per_token"]["training"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["flops"] == pytest.approx(planned * summary["tokens"], rel=1e-12)
    assert "FLOPs planned" not in (tmp_path / "report.html").read_text()
    own = {key for line in lines(tmp_path) for key in line if is_own_name(key)}
    assert own == set(), "whatever the trainer says itself is taken"


def test_progress_of_a_run_from_before_operations_were_counted():
    saved = {k: v for k, v in Progress(step=3, tokens=100).to_json().items() if k != "flops"}
    assert Progress.from_json(saved, 6.0).flops == 600.0
    assert Progress.from_json({**saved, "flops": 7.0}, 6.0).flops == 7.0


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("CalledStep", "CalledStep reports a metric called 'step', a name that the log line uses itself"),
        ("TermCalledScale", "TermCalledScale reports a loss term called 'scale'"),
        ("ScoreCalledBytes", "ScoreCalledBytes reports a held-out metric called 'bytes'"),
    ],
)
def test_a_name_that_is_taken_is_refused(tmp_path, adapter, words):
    with pytest.raises(ValueError, match=words):
        train(*of(adapter, "logging_steps=100"), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists(), "before a line holds it"


@pytest.mark.parametrize(
    "name", ["loss", "loss_ce", "lr/matrix", "tokens", "mfu", "val_depth", "total_steps"]
)
def test_taken_names(name):
    adapter = adapter_of("vanilla")
    with pytest.raises(
        ValueError, match=f"metric called '{name}'.* taken are .*grad_norm.*loss_\\.\\.\\., .*lr/\\.\\.\\."
    ):
        refuse_taken_names(adapter, StepOutput({}, {name: None}))
    refuse_taken_names(adapter, StepOutput({}, {f"{Reporting.__name__}_{name.replace('/', '')}": None}))


# -- what is optional ----------------------------------------------------------------------------------------------


def failing(*args, **kwargs):
    raise RuntimeError("no such luck\nbecause")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trainer.loop.sample_text", "no sample of step 3: RuntimeError: no such luck"),
        ("trainer.run.folder.RunFolder.add_sample", "no sample of step 3: RuntimeError: no such luck"),
        ("trainer.run.record.write_report", "no new report.html: RuntimeError: no such luck"),
        ("trainer.view.charts.Chart.svg", "no new report.html: RuntimeError: no such luck"),
        ("trainer.run.folder.RunFolder.link_final", "no new final_model: RuntimeError: no such luck"),
    ],
)
def test_what_is_optional_costs_no_finished_run(tmp_path, monkeypatch, capsys, name, words):
    monkeypatch.setattr(name, failing)
    train(*config("gpt2", *FEW, "sample_tokens=4", f"output_dir={tmp_path}"), tmp_path)
    out = capsys.readouterr().out
    assert f"warning: {words}\n" in out and "> this model" in out and "because" not in out
    assert (tmp_path / "summary.json").exists() and (tmp_path / "checkpoint-3").exists()
    assert (tmp_path / "report.html").exists() == ("report" not in words)
    assert ("report      " in out) == ("report" not in words)


def test_names_that_are_not_utf8_cost_no_report(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"gr\xfcn")
    train(*config("gpt2", *FEW), folder, lambda cfg: f"# {folder}\nlearning_rate: 1\n")
    assert "gr\\udcfcn" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "config.yaml").read_text(encoding="utf-8").startswith("# ")
    assert "warning" not in capsys.readouterr().out


def test_mapped_pages_are_resident_and_not_anonymous(tmp_path):
    size = 64 << 20
    (tmp_path / "large").write_bytes(b"x" * size)
    before = manifest.anonymous_memory_bytes()
    mapped = np.memmap(tmp_path / "large", dtype=np.uint8, mode="r")
    assert mapped.sum(dtype=np.int64) == size * ord("x")
    assert before > 0 and manifest.anonymous_memory_bytes() - before < size // 4
    before = manifest.anonymous_memory_bytes()
    with mmap.mmap(
        -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    ) as held:  # no memory that was freed before
        held.write(b"x" * size)
        assert manifest.anonymous_memory_bytes() - before > size // 2
    assert manifest.peak_memory_bytes(torch.device("cpu")) > size


def test_a_system_that_says_little(monkeypatch):
    monkeypatch.setattr(manifest.Path, "read_text", lambda *args, **kwargs: "VmPeak: 3 kB\n")
    assert manifest.peak_memory_bytes(torch.device("cpu")) > 1 << 20, "getrusage knows"
    monkeypatch.setitem(sys.modules, "resource", None)
    assert manifest.peak_memory_bytes(torch.device("cpu")) == 0 == manifest.anonymous_memory_bytes()

    def nothing(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(os, "getloadavg", nothing)
    monkeypatch.setattr(manifest.subprocess, "run", nothing)
    found = manifest.collect_environment(torch.device("cpu"))
    assert (found["git_commit"], found["git_dirty"], found["load_average"]) == (None, None, None)
