"""Every architecture's score has a certificate."""

import json

import pytest

import mytrainer
from trainer.bench.certify import bounds, causality, normalisation


@pytest.mark.slow
def test_a_run_certifies_and_the_certificate_holds(whole_run, tmp_path, monkeypatch, capsys):
    """All checks of the run's score, at few places: a model that fails one fails it everywhere."""
    for module, name, value in (
        (causality, "PLACES", 4),
        (normalisation, "PLACES", 2),
        (normalisation, "FEWER_PLACES", 1),
        (normalisation, "COPIES", 1),
        (bounds, "MOST", bounds.DRAWS),
    ):
        monkeypatch.setattr(module, name, value)
    file, run = tmp_path / "c.json", str(whole_run[0])
    words = ["--checkpoint", run, "--device", "cpu", "--val_bytes", "600", "--certify", str(file)]
    assert mytrainer.main(["eval", *words]) == 0, capsys.readouterr().err
    found = json.loads(file.read_text())
    results = {check["name"]: check["result"] for check in found["checks"]}
    assert found["certified"] and results["normalisation"] == results["bytes"] == "passed"
    bound = found["score"]["kind"] == "bound"
    assert bound == (results.get("bound") == "passed")
    assert results["causality"] == "passed" or bound
    assert found["score"]["bits_per_byte"] > 0
