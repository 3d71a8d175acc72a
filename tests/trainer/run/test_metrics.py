"""metrics.jsonl: strict JSON, crash leftovers, truncation on resume."""

import json
import math
import os

import numpy as np
import pytest
import torch

from trainer.errors import TrainingError
from trainer.run.metrics import MetricsWriter, read_metrics


def strict(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_every_line_is_strict_json_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(3):
        writer.write({"step": step, "loss": 1.5 - step, "note": "é"})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert strict(lines[step]) == {"step": step, "loss": 1.5 - step, "note": "é"}
        assert len(lines) == step + 1


def test_non_finite_values_survive(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "a": math.nan, "b": [math.inf], "c": {"d": -math.inf}, "text": "NaN?"})
    strict((tmp_path / "metrics.jsonl").read_text())
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["a"])
    assert (line["b"], line["c"], line["text"]) == ([math.inf], {"d": -math.inf}, "NaN?")


def test_numpy_and_tensor_scalars(tmp_path):
    MetricsWriter(tmp_path).write({"step": np.int64(3), "loss": torch.tensor(0.5), "x": np.float32("nan")})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["step"], line["loss"]) == (3, 0.5)
    assert math.isnan(line["x"])
    with pytest.raises(TypeError):
        MetricsWriter(tmp_path).write({"step": object()})


def test_truncation_drops_later_steps_and_the_torn_line(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (10, 20, 30, 20):
        writer.write({"step": step})
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 15, "lo')
    writer.truncate_after(20)
    assert path.read_text() == '{"step": 10}\n{"step": 20}\n{"step": 20}\n'
    writer.write({"step": 25})
    assert [line["step"] for line in read_metrics(path)] == [10, 20, 20, 25]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_torn_line_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    MetricsWriter(tmp_path).write({"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]


def test_truncation_is_atomic(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1})
    writer.write({"step": 2})

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(TrainingError, match="the disk is full"):
        writer.truncate_after(1)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_unwritable_file_is_one_message(tmp_path):
    writer = MetricsWriter(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(TrainingError, match=r"could not write .*metrics\.jsonl: Is a directory"):
        writer.write({"step": 1})


def test_damage_inside_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object: \[2\]"):
        read_metrics(path)
