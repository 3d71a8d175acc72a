"""Whole runs: what is left behind, exact resume, golden curves, processes, compilation, kill -9."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.contract.record import golden_curve
from tests.contract.tiny import config, golden, overrides
from trainer.loop import train
from trainer.run.checkpoint import checkpoints_in, load_json, load_tensors

ROOT = Path(__file__).resolve().parents[2]
# Everything that could break exactness at once: accumulation, EMA, dropout where the architecture has it.
HARD = ["batch_size=2", "ema_decay=0.9", "save_steps=1", "save_total_limit=null", "logging_steps=3"]


def flat(value, prefix=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{prefix}/{key}")
    else:
        yield prefix, value


def assert_same_state(one: Path, other: Path) -> None:
    for name in ("model.pt", "optimizer.pt", "ema.pt"):
        left, right = dict(flat(load_tensors(one, name))), dict(flat(load_tensors(other, name)))
        assert left.keys() == right.keys()
        for key, value in left.items():
            same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
            assert same, f"{name}{key} differs"


def losses(run: Path) -> list:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def with_dropout(architecture: str) -> list[str]:
    _, model_cfg = config(architecture)
    return ["model_cfg.dropout=0.1"] if "dropout" in type(model_cfg).model_fields else []


@pytest.fixture(scope="session")
def whole_run(architecture, tmp_path_factory):
    """Six steps in one go, every step saved."""
    run = tmp_path_factory.mktemp(f"{Path(architecture).stem}-whole")
    score = train(*config(architecture, *HARD, *with_dropout(architecture)), run)
    return run, score


def test_a_run_leaves_what_it_promises(whole_run, architecture):
    run, score = whole_run
    summary = json.loads((run / "summary.json").read_text())
    assert summary["score"]["bits_per_byte"] == score and 0 < score < 9
    assert summary["score"]["kind"] in ("exact", "bound") and summary["score"]["context_bytes"] > 0
    assert summary["tokens"] == 6 * 4 * 32 and summary["flops"] > 0 and summary["peak_memory_bytes"] > 0
    assert {"uniform", "unigram", "3-gram", "6-gram", "xz", "bz2"} <= summary["yardsticks"].keys()
    assert "--- step 6 ---" in (run / "samples.txt").read_text()
    assert (run / "report.html").stat().st_size < 300_000
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["fingerprint"] and manifest["parameters"]["total"] > 0
    for name in ("model.pt", "config.json", "tokenizer.json", "training_state.json", "optimizer.pt"):
        assert (run / name).exists() and (run / "final_model" / name).exists()
    assert not list(run.glob(".*.tmp")), "every step was saved, the last one twice"
    evaluations = [line for line in losses(run) if "val_bits_per_byte" in line]
    assert [line["step"] for line in evaluations] == [3, 6]


@pytest.mark.parametrize("at", [1, 4])
def test_resume_is_exact(whole_run, architecture, tmp_path, at):
    """N + M steps at once equal N steps, a restart into fresh objects, and M steps: weights, optimizer, EMA, log."""
    run, score = whole_run
    shutil.copytree(run / f"checkpoint-{at}", tmp_path / f"checkpoint-{at}")
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 7, "lo')
    again = train(
        *config(architecture, *HARD, *with_dropout(architecture), "resume=auto", f"output_dir={tmp_path}"),
        tmp_path,
    )
    assert again == score
    assert_same_state(run / "checkpoint-6", tmp_path / "checkpoint-6")
    assert losses(tmp_path) == losses(run)


@pytest.mark.slow
def test_golden_curve(architecture):
    """Twenty steps in fp64: any change to the arithmetic of model, loss, optimizer or order shows."""
    assert golden_curve(architecture) == pytest.approx(golden(architecture)["curve"], rel=1e-6)


@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones(architecture, monkeypatch):
    from tests.contract.tiny import adapter_of, batch_for, loss_and_gradients

    adapter = adapter_of(architecture)
    eager, eager_gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    for path in adapter.blocks():
        adapter.model.get_submodule(path).compile(backend="aot_eager", fullgraph=True)
    compiled, compiled_gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    assert compiled == pytest.approx(eager, rel=1e-5)
    for name, gradient in eager_gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.slow
def test_kill_at_a_random_moment_and_resume(architecture, tmp_path):
    """kill -9 while training, more than once; the end is bit for bit that of a run left alone."""
    steps = ["num_iterations=60", "val_loss_every=0", "save_steps=5", "sample_tokens=0"]
    args = [*overrides(architecture, *HARD, *with_dropout(architecture)), *steps, "save_total_limit=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    base = [sys.executable, "mytrainer.py", *args]
    alone = tmp_path / "alone"
    subprocess.run([*base, f"output_dir={alone}"], cwd=ROOT, env=env, check=True, capture_output=True)
    killed = tmp_path / "killed"
    chance = random.Random(os.getpid())
    for _ in range(2):
        child = subprocess.Popen(
            [*base, f"output_dir={killed}", "resume=auto"],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        before = len(checkpoints_in(killed)) and checkpoints_in(killed)[-1].name
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and child.poll() is None:
            found = checkpoints_in(killed)
            if found and found[-1].name != before:
                break
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = subprocess.run(
        [*base, f"output_dir={killed}", "resume=auto"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_same_state(alone / "checkpoint-60", killed / "checkpoint-60")


@pytest.mark.slow
def test_two_processes_equal_one(architecture, tmp_path):
    """The same global batch on one process and on two: the same losses to rounding; and one resumed on two."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    one, two, mixed = (tmp_path / name for name in ("one", "two", "mixed"))
    # Plain descent without dropout: Adam's and Muon's normalisation would magnify rounding, and dropout is drawn per
    # micro-batch of a process.
    plain = [
        "optimizer=sgd",
        "learning_rate=0.1",
        *(f"{w.partition('=')[0]}=0.0" for w in with_dropout(architecture)),
    ]
    words = overrides(architecture, "batch_size=1", "logging_steps=1", "save_steps=3", *plain)
    base = [sys.executable, "mytrainer.py", *words]
    for run, processes in ((one, 1), (two, 2)):
        done = subprocess.run(
            [*base, f"output_dir={run}", f"num_gpus={processes}"],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    shutil.copytree(one / "checkpoint-3", mixed / "checkpoint-3")
    shutil.copy(one / "metrics.jsonl", mixed / "metrics.jsonl")
    done = subprocess.run(
        [*base, f"output_dir={mixed}", "num_gpus=2", "resume=auto"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "world_size was 1 and is 2" in done.stdout + done.stderr
    for other in (two, mixed):
        assert [line["step"] for line in losses(other)] == [line["step"] for line in losses(one)]
        for left, right in zip(losses(one), losses(other), strict=True):
            for key in ("loss", "grad_norm", "val_bits_per_byte"):
                if key in left:
                    assert math.isclose(left[key], right[key], rel_tol=2e-5), (left["step"], key)
    weights = load_tensors(one / "checkpoint-6", "model.pt")
    for name, value in load_tensors(two / "checkpoint-6", "model.pt").items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4, msg=name)
    assert load_json(two / "checkpoint-6", "training_state.json")["execution"]["world_size"] == 2
