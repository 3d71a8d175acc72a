"""What is kept of a job, and when two configurations are the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.schema import RunConfig
from trainer.sweep.jobs import Job, digest, jobs_in, next_number

BASE = RunConfig(type="gpt2", model_cfg={"d_model": 64}, input_file="a/text.txt").model_dump(mode="json")


@pytest.mark.parametrize(
    "changed",
    [
        {"output_dir": "x"},
        {"device": "cpu"},
        {"num_gpus": 2},
        {"input_file": "b/text.txt"},
        {"resume": "auto"},
    ],
)
def test_place_and_machine_are_no_part_of_a_run_unless_a_sweep_is_over_them(changed):
    other = {**BASE, **changed}
    assert digest(other) == digest(BASE)
    assert digest(other, changed) != digest(BASE, changed)


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"model_cfg": {"d_model": 96}}, {"input_file": "a/other.txt"}, {"mixed_precision": "no"}],
)
def test_everything_else_is(changed):
    assert digest({**BASE, **changed}) != digest(BASE)


def made(folder: Path, name: str, state: str = "ok") -> Job:
    job = Job.new(folder / name, folder / name, RunConfig(type="gpt2", env={"MY_KEY": "k3y"}))
    job.place.mkdir(parents=True)
    job.begin()
    job.end(state)
    return job


def test_a_record_is_read_back_wherever_its_sweep_is_moved_to(tmp_path):
    made(tmp_path / "old", "0")
    (tmp_path / "old").rename(tmp_path / "new")
    (job,) = jobs_in(tmp_path / "new")
    assert (job.run, job.place, job.state) == (tmp_path / "new" / "0", tmp_path / "new" / "0", "ok")
    assert "k3y" not in (job.place / "job.json").read_text()


def test_jobs_are_in_order_and_the_next_number_is_free(tmp_path):
    for name in ("10", "2", "named", "0"):
        made(tmp_path, name)
    assert [job.place.name for job in jobs_in(tmp_path)] == ["0", "2", "10", "named"]
    assert (next_number(jobs_in(tmp_path)), next_number([])) == (11, 0)


def test_only_a_run_that_came_to_its_end_has_a_score(tmp_path):
    job = made(tmp_path, "0")
    assert job.done() is None  # it says so, and there is no summary
    (job.run / "summary.json").write_text(json.dumps({"score": {"bits_per_byte": 2.0}}))
    assert job.done() == 2.0
    (job.run / "summary.json").write_text(
        json.dumps({"score": {"bits_per_byte": 2.0}, "best": {"bits_per_byte": 1.5}})
    )
    assert job.done() == 1.5
    job.begin()
    assert job.done() is None and len(job.lives) == 2


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "job.json").write_text("{")
    with pytest.raises(ValueError, match=r"0/job\.json: is no record of a job"):
        jobs_in(tmp_path)
