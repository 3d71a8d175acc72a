"""What a sweep came to, from folders as runs leave them."""

from __future__ import annotations

import csv
import json

import pytest

from configs.schema import RunConfig
from trainer.sweep.jobs import Job, jobs_in
from trainer.sweep.table import rows_of, write_tables


@pytest.fixture
def sweep(tmp_path):
    """Four jobs: one diverged, one was killed, two came to their end, the second on another text."""
    for number, (rate, state, bits, data) in enumerate(
        [
            (0.1, "failed", None, "a"),
            (0.2, "ok", 2.0, "a"),
            (0.3, "ok", 1.0, "b"),
            (0.4, "running", None, "a"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        cfg = RunConfig(type="gpt2", learning_rate=rate, output_dir=str(number), model_cfg={"d_model": 64})
        job = Job.new(folder, folder, cfg)
        job.begin()
        if state != "running":
            job.end(state, "step 3 is not finite" if state == "failed" else "")
        job.lives[-1] |= {
            "host": "here",
            "begin": number * 10.0,
            "end": state != "running" and number * 10.0 + 15,
        }
        job.write()
        (folder / "manifest.json").write_text(json.dumps({"data": {"content": data, "heldout_bytes": 9}}))
        if bits:
            score = {"bits_per_byte": bits, "kind": "exact", "documents": 3, "bytes": 9, "of": "text"}
            summary = {"score": score, "tokens": 640, "steps": 5, "seconds": 2.5, "parameters": {"total": 7}}
            (folder / "summary.json").write_text(json.dumps(summary))
            lines = [
                {"step": 2, "tokens": 200, "bytes": 400, "flops": 1000, "loss": 1.0, "seconds": 1.0},
                {"step": 1, "tokens": 100, "seconds": 0.5, "val_bits_per_byte": 3.25},
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_every_job_has_a_row_whatever_became_of_it(sweep):
    varied, rows = rows_of(jobs_in(sweep), sweep)
    assert varied == ["learning_rate"]  # not the folder, which differs too
    assert [(row["job"], row["state"]) for row in rows] == [
        ("2", "ok"),
        ("1", "ok"),
        ("0", "failed"),
        ("3", "killed"),
    ]
    assert rows[2]["why"] == "step 3 is not finite" and rows[3]["bits_per_byte"] is None
    assert (rows[1]["tokens"], rows[1]["parameters"], rows[1]["fields"]) == (640, 7, {"learning_rate": 0.2})


def test_runs_at_the_same_time_on_one_machine_are_marked(sweep):
    jobs = jobs_in(sweep)
    assert [row["shared"] for row in sorted(rows_of(jobs, sweep)[1], key=lambda r: r["job"])] == [
        True,
        True,
        True,
        False,
    ]
    jobs[1].lives[-1]["host"] = "there"
    assert {row["job"]: row["shared"] for row in rows_of(jobs, sweep)[1]}["1"] is False


def test_scores_of_other_text_are_marked(sweep):
    jobs = jobs_in(sweep)
    _, rows = rows_of(jobs[:2] + jobs[2:3], sweep)
    told = {row["job"]: (row["comparable"], row["differs"]) for row in rows}
    assert (
        told["1"] == (True, "")
        and told["2"] == (False, "another held-out text")
        and told["0"] == (False, "no score")
    )


def test_the_three_files_say_the_same(sweep):
    assert len(write_tables(sweep)) == 4
    told = json.loads((sweep / "summary.json").read_text())["jobs"]
    with open(sweep / "summary.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["job"] for line in lines] == [row["job"] for row in told] == ["2", "1", "0", "3"]
    assert lines[1]["learning_rate"] == "0.2" and lines[1]["bits_per_byte"] == "2.0"
    page = (sweep / "compare.html").read_text()
    assert "step 3 is not finite" in page and "not comparable: another held-out text" in page
    assert "http" not in page.replace("http://www.w3.org", "") and "mytrainer compare" in page
    assert "not comparable: another held-out text" in (sweep / "compare.md").read_text()


def test_what_is_damaged_costs_the_others_nothing(sweep):
    (sweep / "2/metrics.jsonl").write_text("what\n{}\n")
    (sweep / "0/summary.json").write_text('{"score": {"bits_per_byte": NaN}}')
    assert len(write_tables(sweep)) == 4
    page = (sweep / "compare.html").read_text()
    assert "2/metrics.jsonl:1: not a JSON object: what" in page and "step 3 is not finite" in page


def test_a_sweep_of_which_nothing_has_begun_leaves_nothing(tmp_path):
    assert write_tables(tmp_path) == [] and not list(tmp_path.iterdir())
