"""What takes long: golden curves, compilation, kill -9, two processes."""

import gc
import math
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests.contract.forks import finished, started
from tests.contract.pair import train_here
from tests.contract.record import golden_curve
from tests.contract.test_run import assert_same_state, losses
from tests.contract.tiny import (
    HARD,
    adapter_of,
    batch_for,
    config,
    device,
    loss_and_gradients,
    overrides,
    session_of,
    trainer_of,
    with_dropout,
)
from trainer.loop import train
from trainer.run.checkpoint import checkpoints_in, load_json, load_tensors


@pytest.mark.slow
def test_golden_curve(architecture, recorded):
    """Twenty steps in fp64: any change to the arithmetic of model, loss, optimizer or order shows."""
    assert golden_curve(architecture) == pytest.approx(recorded["curve"], rel=1e-6)


@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones(architecture):
    adapter = adapter_of(architecture)
    eager, eager_gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    for path in adapter.blocks():
        adapter.model.get_submodule(path).compile(backend="aot_eager", fullgraph=True)
    compiled, compiled_gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    assert compiled == pytest.approx(eager, rel=1e-5)
    for name, gradient in eager_gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    graphs = counters["stats"]["unique_graphs"]
    loss_and_gradients(adapter, [batch_for(adapter, seed=1)])
    assert counters["stats"]["unique_graphs"] == graphs > 0, "another batch compiles nothing anew"


def memory_in_use() -> int:
    """Bytes, of tensors on a device, else of the process."""
    gc.collect()
    if device().type == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what is in use")
def test_memory_stays_flat_over_300_steps(architecture):
    """Whatever outlives a step shows after so many, one vector of its states too."""
    session = session_of(
        architecture, "num_iterations=300", "global_batch_size=2", *with_dropout(architecture)
    )
    trainer, after = trainer_of(session), {}
    for step in range(300):
        batch = session.loader.load(step)
        denominators, *_ = trainer._agree(batch)
        trainer._train_step(batch, denominators)
        if step % 10 == 9:
            trainer.meter.read(session.world)
        after[step + 1] = memory_in_use() if step + 1 in (50, 300) else 0
    assert after[300] - after[50] < 250 * 8_000, after


@pytest.mark.slow
@pytest.mark.on_cpu("bit for bit is promised there alone")
def test_kill_at_a_random_moment_and_resume(architecture, tmp_path):
    """kill -9 while training, more than once; the end is bit for bit that of a run left alone.

    Processes are forks of one that has imported everything, which takes longer than these runs.
    """
    steps = ["num_iterations=60", "val_loss_every=0", "save_steps=5", "sample_tokens=0"]
    words = [*overrides(architecture, *HARD, *with_dropout(architecture)), *steps, "save_total_limit=2"]
    alone, killed, said = (tmp_path / name for name in ("alone", "killed", "said.txt"))
    finished([*words, f"output_dir={alone}"], said)
    again = [*words, f"output_dir={killed}", "resume=auto"]
    chance = random.Random(os.getpid())
    for _ in range(2):
        before = checkpoints_in(killed)[-1:]
        child = started(again, said)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and child.is_alive() and checkpoints_in(killed)[-1:] == before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        child.kill()
        child.join()
        assert checkpoints_in(killed)[-1:] != before, said.read_text()
    finished(again, said)
    assert_same_state(alone / "checkpoint-60", killed / "checkpoint-60")


@pytest.mark.slow
@pytest.mark.on_cpu("its two processes would share one GPU")
def test_two_processes_equal_one(architecture, tmp_path, pair):
    """The same global batch on one process and on two: the same losses to rounding; and one resumed on two. Weights and
    buffers of the two are the same to the bit."""
    one, two, mixed = (tmp_path / name for name in ("one", "two", "mixed"))
    # Plain descent without dropout: Adam's and Muon's normalisation would magnify rounding, and dropout is drawn per
    # micro-batch of a process.
    plain = [
        "optimizer=sgd",
        "learning_rate=0.1",
        *(f"{w.partition('=')[0]}=0.0" for w in with_dropout(architecture)),
    ]
    words = ["batch_size=1", "logging_steps=1", "save_steps=3", *plain]
    train(*config(architecture, *words), one)
    shutil.copytree(one / "checkpoint-3", mixed / "checkpoint-3")
    shutil.copy(one / "metrics.jsonl", mixed / "metrics.jsonl")
    pair.ask(train_here, architecture, words, two)
    (said, state), (_, of_the_other) = pair.ask(
        train_here, architecture, [*words, "resume=auto", f"output_dir={mixed}"], mixed
    )
    assert "world_size was 1 and is 2" in said
    assert state.keys() == of_the_other.keys()
    for name, value in state.items():
        assert np.array_equal(value, of_the_other[name]), f"{name} differs between the processes"
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
