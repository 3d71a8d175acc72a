"""Runs and sweeps that take values from variables with secret names: no file and no line has one of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.tiny import overrides

ROOT = Path(__file__).resolve().parents[3]
TEXT = 'pass "w0rd" <&> ü'
NAMED = "MY_TOKEN", "TEXT_SECRET", "API_KEY"


@pytest.fixture
def start(tmp_path):
    """Run a command with three secrets in the environment: (status, all that it said)."""
    texts = tmp_path / "geheim-nis"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"line {number} of a text\n" * 80)
    secrets = dict(zip(NAMED, (TEXT, str(texts), "k3yk3yk3y"), strict=True))

    def run(*words):
        command = [sys.executable, str(ROOT / "mytrainer.py"), *words]
        env = {**os.environ, **secrets, "MYTRAINER_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
        return done.returncode, done.stdout + done.stderr

    return run


def shown(folder):
    """Files below a folder that hold a secret, in any spelling, or the end of a path that is one."""
    given = (TEXT, json.dumps(TEXT)[1:-1], "w0rd", "geheim-nis", "k3yk3yk3y")
    words = [text.encode() for text in given]
    return [p for p in folder.rglob("*") if p.is_file() and any(word in p.read_bytes() for word in words)]


@pytest.mark.slow
def test_no_file_of_a_sweep_holds_a_secret_and_a_run_asks_for_it_again(start, tmp_path):
    taken = ["input_file='${oc.env:TEXT_SECRET}'", "sample_prompt='a ${oc.env:MY_TOKEN}'"]
    words = ["data=text", *taken, "env.MINE='${oc.env:API_KEY}'", "tokenizer=byte", "val_files=[]"]
    sweep = [word for word in overrides("gpt2", *words) if not word.startswith("data=synthetic")]
    status, said = start(*sweep, "-m", "hydra.sweep.dir=sweep")
    assert status == 0 and "w0rd" not in said and "geheim-nis" not in said, said
    assert {"multirun.yaml", "job.json", "training_state.json", "report.html", "manifest.json"} <= {
        path.name for path in (tmp_path / "sweep").rglob("*")
    }
    assert shown(tmp_path / "sweep") == []
    run = f"resume={tmp_path}/sweep/0"
    status, said = start(run, "num_iterations=8")
    assert status == 2 and "input_file is <redacted>" in said and "sample_prompt is <redacted>" in said
    status, said = start(run, "num_iterations=8", *taken)
    assert status == 0 and "changed since the checkpoint: num_iterations 6 -> 8" in said, said
    assert "sample_prompt" not in said and shown(tmp_path / "sweep") == []
