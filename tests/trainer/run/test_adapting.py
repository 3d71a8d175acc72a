"""Runs with adapters: what they need, what they keep, what they are refused for."""

import json
import shutil

import pytest
import torch

from configs.messages import ConfigError
from tests.contract.test_run import assert_same_state
from tests.contract.tiny import config, session_of
from trainer.loop import train
from trainer.run.checkpoint import load_tensors
from trainer.run.restore import restore

SHORT = ["num_iterations=2", "val_loss_every=0", "val_bytes=64", "sample_tokens=0", "lora_rank=2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "run"
    train(*config("vanilla", *SHORT, "ema_decay=0.5", "learning_rate=0.01"), path)
    return path


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapted") / "run"
    words = [
        "use_lora=true",
        f"init_from_checkpoint={base}",
        "lora_lr=0.05",
        "ema_decay=0.5",
        "optimizer=muon",
    ]
    train(*config("vanilla", *SHORT, *words), path)
    return path


def test_weights_to_adapt_are_needed():
    with pytest.raises(
        ConfigError, match="use_lora adapts weights that were trained.* init_from_checkpoint="
    ):
        config("vanilla", "use_lora=true")


def test_the_base_is_what_it_is_scored_with_and_stays(base, adapted):
    found, before = restore(adapted).adapter.model.state_dict(), restore(base).adapter.model.state_dict()
    for name, value in before.items():
        assert torch.equal(found[name], value), name
    assert any(value.any() for name, value in found.items() if "lora_B" in name)
    kept = load_tensors(next(adapted.glob("checkpoint-*")), "model.pt")
    assert kept and all("lora_" in name for name in kept)


def test_adapters_have_a_role_a_rate_and_an_optimizer_of_their_own(adapted):
    manifest = json.loads((adapted / "manifest.json").read_text())
    (trained,) = [row for row in manifest["roles"] if row["optimizer"] != "frozen"]
    assert (trained["role"], trained["optimizer"], trained["lr"]) == ("adapter", "adamw", 0.05)
    flops = manifest["flops_per_token"]
    assert flops["training"] < 2.5 * flops["forward"]


def test_another_base_is_refused(base, adapted, tmp_path):
    other, run = tmp_path / "other", tmp_path / "run"
    train(*config("vanilla", *SHORT, "seed=5"), other)
    shutil.copytree(adapted, run)
    moved = base.with_name("away")
    base.rename(moved)
    try:
        with pytest.raises(
            ValueError, match=r"init_from_checkpoint: .* is not there, whose weights this run adapts"
        ):
            restore(run)
        other.rename(base)
        with pytest.raises(ValueError, match="was trained on another base: base was"):
            restore(run)
    finally:
        shutil.rmtree(base, ignore_errors=True)
        moved.rename(base)


def test_targets_in_another_order_go_on_with_their_own_state(base, tmp_path):
    words = [
        *SHORT,
        "use_lora=true",
        f"init_from_checkpoint={base}",
        "lora_lr=0.05",
        "save_steps=1",
        "ema_decay=0.5",
    ]
    run, again = tmp_path / "run", tmp_path / "again"
    train(*config("vanilla", *words, "lora_targets=[q_proj,v_proj]"), run)  # matrices of one shape
    shutil.copytree(run / "checkpoint-1", again / "checkpoint-1")
    cfg, model_cfg = config("vanilla", *words, "lora_targets=[v_proj,q_proj]")
    train(cfg.model_copy(update={"resume": "auto"}), model_cfg, again)
    assert_same_state(run / "checkpoint-2", again / "checkpoint-2")


def test_a_run_begins_with_the_whole(adapted):
    """With or without adapters of its own; from the average, as it is scored."""
    whole = restore(adapted)
    whole.merge()
    expected = whole.adapter.model.state_dict()
    beside = session_of("vanilla", *SHORT, "use_lora=true", f"init_from_checkpoint={adapted}").adapter
    for name, value in expected.items():
        torch.testing.assert_close(beside.model.state_dict()[name], value)
    session = session_of("vanilla", *SHORT, f"init_from_checkpoint={adapted}")
    whole.source.begin(session, print)
    for name, value in session.adapter.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert all(p.requires_grad for p in session.adapter.parameters())


def test_what_no_loss_depends_on_is_refused_before_the_first_step(base):
    words = [*SHORT, "use_lora=true", f"init_from_checkpoint={base}", "lora_targets=[nothing]"]
    with pytest.raises(ValueError, match="lora_targets: nothing is called 'nothing'"):
        session_of("vanilla", *words)


def test_dropout_is_refused_before_the_first_step_where_it_cannot_act(tmp_path):
    sizes = ["model_cfg.d_model=32", "model_cfg.n_heads=4", "model_cfg.num_experts=2"]
    train(*config("moe", *SHORT, *sizes), tmp_path / "base")
    words = [
        *SHORT,
        *sizes,
        "use_lora=true",
        f"init_from_checkpoint={tmp_path / 'base'}",
        "lora_targets=[up_proj]",
    ]
    with pytest.raises(
        ValueError, match=r"lora_dropout: 0.05 acts on .* layers.0.mlp.experts .* Set lora_dropout=0"
    ):
        session_of("moe", *words)
    assert session_of("moe", *words, "lora_dropout=0").adapter.low_rank
