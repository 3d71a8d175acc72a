"""Whole runs: what is left behind, exact resume, recomputed activations."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.contract.tiny import (
    HARD,
    SHORT,
    STEPS,
    batch_for,
    config,
    loss_and_gradients,
    session_of,
    trainer_of,
    with_dropout,
)
from trainer.evaluate import evaluate
from trainer.loop import train
from trainer.run.checkpoint import load_tensors
from trainer.run.restore import restore


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


def test_a_run_leaves_what_it_promises(whole_run, architecture):
    run, score = whole_run
    summary = json.loads((run / "summary.json").read_text())
    assert summary["score"]["bits_per_byte"] == score and 0 < score < 9
    assert summary["score"]["kind"] in ("exact", "bound") and summary["score"]["context_bytes"] > 0
    assert summary["tokens"] == STEPS * 4 * 32 and summary["flops"] > 0 and summary["peak_memory_bytes"] > 0
    assert {"uniform", "unigram", "3-gram", "6-gram", "xz", "bz2"} <= summary["yardsticks"].keys()
    assert f"--- step {STEPS} ---" in (run / "samples.txt").read_text()
    assert (run / "report.html").stat().st_size < 300_000
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["fingerprint"] and manifest["parameters"]["total"] > 0
    for name in ("model.pt", "config.json", "tokenizer.json", "training_state.json", "optimizer.pt"):
        assert (run / name).exists() and (run / "final_model" / name).exists()
    assert not list(run.glob(".*.tmp")), "every step was saved, the last one twice"
    evaluations = [line for line in losses(run) if "val_bits_per_byte" in line]
    assert [line["step"] for line in evaluations] == [2, STEPS]


# Before any evaluation, and after one, which may have changed what comes next.
@pytest.mark.on_cpu("bit for bit is promised there alone")
@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_resume_is_exact(whole_run, architecture, tmp_path, at):
    """N + M steps at once equal N steps, a restart into fresh objects, and M steps: weights, optimizer, EMA, log."""
    run, score = whole_run
    shutil.copytree(run / f"checkpoint-{at}", tmp_path / f"checkpoint-{at}")
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 5, "lo')
    cfg, model_cfg = config(architecture, *HARD, *SHORT, *with_dropout(architecture))
    again = train(cfg.model_copy(update={"resume": "auto"}), model_cfg, tmp_path)
    assert again == score
    assert_same_state(run / f"checkpoint-{STEPS}", tmp_path / f"checkpoint-{STEPS}")
    assert losses(tmp_path) == losses(run)


def test_what_is_exported_is_what_is_scored(whole_run, architecture, tmp_path, command):
    """Weights, buffers, configuration and tokenizer: all that a score and a text are made of."""
    run, _ = whole_run
    out, err = command("export", "--checkpoint", run, "--to", "safetensors", "--output", tmp_path / "out")
    assert "EMA weights" in out and "rounded" not in err
    ours, theirs = (restore(folder, device="cpu") for folder in (run, tmp_path / "out"))
    assert (theirs.cfg, theirs.adapter.model_cfg) == (ours.cfg, ours.adapter.model_cfg)
    assert (theirs.weights, theirs.micro_rows, theirs.source.data) == ("EMA", 2, ours.source.data)
    assert theirs.tokenizer.to_json() == ours.tokenizer.to_json()
    assert_equal_states(ours.adapter.trained_state(), theirs.adapter.trained_state())
    assert restore(run, raw=True, device="cpu").weights == "raw"


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def after_steps(architecture, *more, steps=3):
    """What was reported of them, and weights and buffers. A step of plain descent is the gradient."""
    words = ["batch_size=2", "optimizer=sgd", "learning_rate=0.1", *with_dropout(architecture), *more]
    session = session_of(architecture, *words)
    trainer = trainer_of(session)
    for step in range(steps):
        batch = session.loader.load(step)
        denominators, *_ = trainer._agree(batch)
        trainer._train_step(batch, denominators)
    return trainer.meter.read(session.world), session.adapter.model.state_dict()


def test_recomputing_activations_changes_nothing(architecture):
    """Blocks run twice then, under the same dropout: neither weights nor buffers nor counts may notice."""
    reported, state = after_steps(architecture)
    again, recomputed = after_steps(architecture, "gradient_checkpointing=true")
    assert again == pytest.approx(reported, rel=1e-5)
    for name, value in state.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_what_is_reported_depends_on_no_split(architecture):
    """Losses, metrics and operations of the log are those of the step, however many micro-batches it was cut into."""
    plain = [f"{word.partition('=')[0]}=0.0" for word in with_dropout(architecture)]
    whole, cut = (after_steps(architecture, f"batch_size={n}", *plain, steps=1)[0] for n in (4, 1))
    assert cut == pytest.approx(whole, rel=1e-4)


def test_an_evaluation_leaves_nothing_behind(architecture):
    """Nothing of one is in the next, nor of the training in between."""
    session = session_of(architecture, "val_tokens=96")
    rows, found = session.heldout(None), []
    for _ in range(2):
        found.append(evaluate(session.adapter, rows, session.world, batch_rows=2, seed=0).as_dict())
        loss_and_gradients(session.adapter, [batch_for(session.adapter)])
    assert found[0] == found[1]
