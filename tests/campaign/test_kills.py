"""A campaign of kills sees what a run loses."""

import json
import shutil

import pytest

from tests.campaign import compare, kills
from tests.campaign.jail import SHARED
from tests.contract.tiny import config
from trainer.loop import train
from trainer.run.checkpoint import save_checkpoint


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


def _saved(path, *steps, metrics=6):
    path.mkdir(exist_ok=True)
    for step in steps:
        save_checkpoint(path, step, {"model.pt": {"step": step}}, {"training_state.json": "{}"})
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, metrics + 1)]
    (path / "metrics.jsonl").write_text("".join(lines))
    path.with_suffix(".log").touch()


LIVES = {  # what one does that is cut short, how it ends, and what is said of it
    "all is well": (lambda path: _saved(path, 2, metrics=3), "status -9", ""),
    "more than an interval": (lambda path: _saved(path, 2, metrics=5), "status -9", "saved step 2 of 5"),
    "a traceback": (lambda path: None, "traceback", "SIGKILL (operation) at 0.500 in process 0: traceback"),
    "something left": (lambda path: _saved(path, 1), "status -9", "differs: checkpoint-1/model.pt"),
    "room": (lambda path: (path / ".lock").write_bytes(b"x" * 30_000), "status -9", " bytes instead of "),
    "a hang": (lambda path: None, "hang", "process 0: hang"),
}


@pytest.mark.parametrize("what", LIVES)
def test_what_happens_in_a_life_is_seen(what, tmp_path, monkeypatch):
    happens, ended, said = LIVES[what]
    (tmp_path / SHARED).mkdir()
    (tmp_path / "0").mkdir()

    def life(path, type_, words, faults):
        cut_short = faults[0] is not None and path.name == "run"
        if faults[0] is not None:
            faults[0](0)
        if cut_short:
            path.mkdir()
            happens(path)
        else:
            _saved(path, 2, 6)
        return ended if cut_short else "ended"

    monkeypatch.setattr(kills, "life", life)
    monkeypatch.setattr(kills, "words_of", lambda *case: [])
    case = kills.Case("gpt2", "text", 1, (kills.Fault("operation", 0.5),))
    outcome, detail, counts = kills.try_(case, tmp_path / "0", None)
    assert outcome == (kills.WRONG if said else kills.OK) and said in detail
    assert counts["at last: ended"] == counts["of text"] == 1
    assert counts[f"operation: {'killed' if ended == 'status -9' else ended}"] == 1
