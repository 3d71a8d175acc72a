"""A campaign of kills sees what a run loses."""

import json
import shutil

from tests.campaign import compare
from tests.contract.tiny import config
from trainer.loop import train


def test_what_a_run_lost_is_seen(tmp_path):
    """Times may differ, and nothing else."""
    train(*config("gpt2", "num_iterations=2", "sample_tokens=2", "val_bytes=64"), tmp_path / "whole")
    whole, room = compare.contents(tmp_path / "whole"), compare.room(tmp_path / "whole")
    path = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"seconds": 99.0}))
    assert compare.differences(path, whole) == []
    assert compare.room(path) > 1.5 * room, "a copy has no links"
    (path / "summary.json").write_text(json.dumps(summary | {"tokens": 99}))
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))
    (path / "samples.txt").unlink()
    (path / ".checkpoint-2.0123456789abcdef.tmp").mkdir()
    (path / ".checkpoint-2.0123456789abcdef.tmp/model.pt").write_bytes((path / "model.pt").read_bytes())
    found = compare.differences(path, whole)
    assert found == [
        ".checkpoint-2.0123456789abcdef.tmp/model.pt",
        "metrics.jsonl",
        "samples.txt",
        "summary.json",
    ]
