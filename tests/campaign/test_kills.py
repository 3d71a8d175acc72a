"""A campaign of kills sees what a run loses, and a share of it is tried here."""

import json
import shutil

import pytest

from tests.campaign import kills
from tests.contract.tiny import config
from trainer.loop import train


def test_what_a_run_lost_is_seen(tmp_path):
    """Times may differ, and nothing else."""
    train(*config("gpt2", "num_iterations=2", "sample_tokens=2", "val_bytes=64"), tmp_path / "whole")
    whole, room = kills.contents(tmp_path / "whole"), kills.room(tmp_path / "whole")
    path = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"seconds": 99.0}))
    assert kills.differences(path, whole) == []
    assert kills.room(path) > 1.5 * room, "a copy has no links"
    (path / "summary.json").write_text(json.dumps(summary | {"tokens": 99}))
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))
    (path / "samples.txt").unlink()
    (path / ".checkpoint-2.0123456789abcdef.tmp").mkdir()
    (path / ".checkpoint-2.0123456789abcdef.tmp/model.pt").write_bytes((path / "model.pt").read_bytes())
    found = kills.differences(path, whole)
    assert found == [
        ".checkpoint-2.0123456789abcdef.tmp/model.pt",
        "metrics.jsonl",
        "samples.txt",
        "summary.json",
    ]


@pytest.mark.slow
def test_a_share_of_it(tmp_path, capsys):
    assert kills.main(["--minutes", "0.2", "--seed", "3", "--json", str(tmp_path / "figures.json")]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["runs"] >= 1
