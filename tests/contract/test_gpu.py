"""What runs on a GPU as nowhere else: number formats, compilation, the search for a batch, moving between devices.

Each body also runs on a CPU, in the slow tier, so that its own mistakes are found without a GPU.
"""

import json
import math
import shutil
from contextlib import contextmanager

import pytest
import torch

from tests.contract.test_run import losses
from tests.contract.tiny import (
    HARD,
    SHORT,
    STEPS,
    adapter_of,
    batch_for,
    config,
    loss_and_gradients,
    session_of,
    trainer_of,
)
from trainer.loop import train
from trainer.run.checkpoint import load_tensors

ON_CPU, ON_GPU = pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)
everywhere = pytest.mark.parametrize("where", [ON_CPU, ON_GPU])
QUICK = ["num_iterations=6", "logging_steps=1", "val_loss_every=0", "val_tokens=64", "sample_tokens=0"]


def manifest(run):
    return json.loads((run / "manifest.json").read_text())


@everywhere
def test_loss_and_gradients_are_those_of_a_cpu(architecture, where):
    adapter = adapter_of(architecture, dtype=torch.float64).cpu()
    plain, plain_gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    adapter.to(where)
    found, gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    assert found == pytest.approx(plain, rel=1e-9)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name].cpu(), gradient, rtol=1e-6, atol=1e-11, msg=name)


@pytest.mark.parametrize(
    ("where", "precision", "compiled"),
    [
        pytest.param("cpu", "bf16", False, marks=pytest.mark.slow),
        *(
            pytest.param("cuda", precision, compiled, marks=pytest.mark.gpu)
            for precision in ("no", "bf16")
            for compiled in (False, True)
        ),
    ],
)
def test_trains_alike_in_every_number_format_and_compiled(architecture, where, precision, compiled, tmp_path):
    """Without dropout the losses are those of fp32 on a CPU, but for rounding."""
    train(*config(architecture, *QUICK, "device=cpu", "torch_compile=false"), tmp_path / "plain")
    words = [f"device={where}", f"mixed_precision={precision}", f"torch_compile={str(compiled).lower()}"]
    train(*config(architecture, *QUICK, *words), tmp_path / "other")
    said = manifest(tmp_path / "other")
    assert (said["precision"], said["compiled"]) == (precision, compiled)
    assert said["execution"]["device"] == where
    plain, other = (
        [line["loss"] for line in losses(tmp_path / name) if "loss" in line] for name in ("plain", "other")
    )
    assert len(plain) == 6 and other == pytest.approx(plain, rel=0.03 if precision != "no" else 1e-3)


@everywhere
def test_the_loss_of_fp16_is_scaled_until_steps_are_taken(architecture, where, tmp_path):
    words = [f"device={where}", "mixed_precision=fp16", "torch_compile=false", "num_iterations=20"]
    train(*config(architecture, *QUICK, *words), tmp_path)
    scaler = load_tensors(tmp_path / "checkpoint-20", "optimizer.pt")["scaler"]
    assert scaler["enabled"] and scaler["good_steps"] > 1 and scaler["scale"] > 1
    assert all(math.isfinite(line["loss"]) for line in losses(tmp_path) if "loss" in line)


@everywhere
def test_a_run_goes_on_on_another_device(architecture, where, tmp_path):
    """Half of it here and half on a CPU, and the other way round, end as a run on a CPU does."""
    words = [*HARD, *SHORT, "optimizer=adamw"]  # orthogonalised momentum magnifies rounding
    alone = train(*config(architecture, *words, "device=cpu", "torch_compile=false"), tmp_path / "alone")
    for name, first, then in (("from", where, "cpu"), ("to", "cpu", where)):
        begun, ended = tmp_path / name / "begun", tmp_path / name / "ended"
        train(*config(architecture, *words, f"device={first}", "torch_compile=false"), begun)
        shutil.copytree(begun / "checkpoint-2", ended / "checkpoint-2")
        shutil.copy(begun / "metrics.jsonl", ended / "metrics.jsonl")
        cfg, model_cfg = config(architecture, *words, f"device={then}", "torch_compile=false")
        score = train(cfg.model_copy(update={"resume": "auto"}), model_cfg, ended)
        assert manifest(ended)["execution"]["device"] == then
        assert (ended / f"checkpoint-{STEPS}").is_dir() and score == pytest.approx(alone, rel=1e-3)


@contextmanager
def nothing_may_wait(where):
    """In the body an operation that waits for the GPU is an error."""
    if where == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@everywhere
def test_the_host_runs_ahead_of_the_device(architecture, where):
    """Of whole steps, optimizer and meter included, from the second on."""
    session = session_of(architecture, f"device={where}", "batch_size=2")
    trainer = trainer_of(session)
    for step in range(5):
        if session.adapter.waits:
            pytest.skip(f"it waits by declaration: {', '.join(session.adapter.waits)}")
        batch = session.loader.load(step)
        denominators, *_ = trainer._agree(batch)
        with nothing_may_wait(where if step else "cpu"):
            trainer._train_step(batch, denominators)


@everywhere
def test_all_rows_are_one_batch_where_they_fit(where, tmp_path):
    train(*config("vanilla", *QUICK, f"device={where}", "batch_size=auto"), tmp_path)
    assert manifest(tmp_path)["execution"]["micro_rows"] == 4


@pytest.mark.gpu
def test_the_largest_batch_that_fits_is_found(tmp_path):
    """In 256 MiB, of 4,096 rows that want some GiB."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**28 / total)
    try:
        words = ["device=cuda", "batch_size=auto", "global_batch_size=4096", "num_iterations=2"]
        train(*config("vanilla", *QUICK, *words, "torch_compile=false"), tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 < manifest(tmp_path)["execution"]["micro_rows"] < 4096
