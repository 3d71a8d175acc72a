"""Rates of components: who has which, and what stays as it is at 0."""

import json
import shutil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adapters import build_adapter
from adapters.base import weighted_loss
from adapters.lora import attach
from configs.messages import ConfigError
from configs.trust import trusting
from data.tokenizers import ByteTokenizer
from tests.contract.test_run import assert_same_state
from tests.contract.tiny import Letters, batch_for, config, context, loss_and_gradients
from trainer.loop import train
from trainer.optim.optimizers import build_optimizers, role_table
from trainer.run.checkpoint import load_tensors
from trainer.run.restore import restore

TOY = 'model_adapter="tests.adapters.rates_toy:Adapter"'
SHORT = ["num_iterations=2", "val_loss_every=0", "val_bytes=64", "sample_tokens=0"]
LENGTH = 32


@pytest.fixture(autouse=True)
def _trusted():
    """Runs of the toy here are opened again."""
    with trusting("tests"):
        yield


def of(*words):
    return config("vanilla", TOY, *words)


def made(*words):
    cfg, model_cfg = of(*words)
    return build_adapter(cfg, model_cfg, Letters()), cfg


def rows(*words):
    adapter, cfg = made(*words)
    table = role_table(adapter.named_model_parameters(), adapter.param_roles(), cfg, adapter.width)
    assert sum(r["parameters"] for r in table) == adapter.parameter_count, "each in exactly one group"
    return table


def treatments(role, *words):
    """Of the parameters of a role, the smaller group (vectors) first."""
    found = sorted((r for r in rows(*words) if r["role"] == role), key=lambda r: r["parameters"])
    return [(r["optimizer"], r["lr"], r["weight_decay"]) for r in found]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_components_have_adamw_and_rates_of_their_own_at_any_width(optimizer):
    words = [f"optimizer={optimizer}", "lr_base_width=7", "memory_lr=0.002", "weight_decay=0.3"]
    assert treatments("memory", *words) == [("adamw", 0.002, 0.0), ("adamw", 0.002, 0.3)]
    assert treatments("memory_bank", *words) == [("adamw", 0.002, 0.0)], "a bank never decays"
    assert treatments("memory_bank", *words, "memory_bank_lr=0.007") == [("adamw", 0.007, 0.0)]


def test_defaults_of_the_rates():
    assert {lr for _, lr, _ in treatments("memory") + treatments("memory_bank")} == {1e-4}
    plain = ["optimizer=adamw", "learning_rate=0.003", "lr_scaling=none"]
    for role in ("matrix", "embedding", "scalar"):
        assert {lr for _, lr, _ in treatments(role, *plain)} == {0.003}
        assert {lr for _, lr, _ in treatments(role, *plain, "base_model_lr=0.005")} == {0.005}
    (matrices,) = treatments("matrix", "optimizer=adamw", "base_model_lr=0.005", "lr_base_width=32")
    assert matrices[1] == 0.005 * 32 / 64, "it follows the width as learning_rate does"


def test_one_rate_for_a_model_that_muon_steps_is_refused():
    with pytest.raises(
        ConfigError, match=r"base_model_lr \(0.01\) .* Set learning_rate and muon_learning_rate"
    ):
        of("optimizer=muon", "base_model_lr=0.01")
    assert {optimizer for optimizer, *_ in treatments("matrix", "optimizer=muon", "base_model_lr=0")} == {
        "frozen"
    }


@pytest.mark.parametrize("field", ["base_model_lr", "memory_lr", "memory_bank_lr", "lora_lr"])
def test_rates_below_0_are_refused(field):
    with pytest.raises(ConfigError, match=f"{field}: must satisfy 0 <= {field}, got -0.1"):
        of(f"{field}=-0.1")


@pytest.mark.parametrize(
    ("words", "still"),
    [
        (["base_model_lr=0"], {"matrix", "embedding", "scalar"}),
        (["memory_lr=0"], {"memory", "memory_bank"}),
        (["memory_lr=0", "memory_bank_lr=0.1"], {"memory"}),
        (["memory_bank_lr=0"], {"memory_bank"}),
    ],
)
def test_at_a_rate_of_0_there_are_no_gradients_and_no_state(words, still):
    adapter, cfg = made(*words)
    rules = adapter.param_roles()
    frozen = {r["role"] for r in rows(*words) if r["optimizer"] == "frozen"}
    assert set(adapter.still) == frozen == still
    _, gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    trained = {n for n, p in adapter.named_model_parameters() if p.requires_grad}
    assert gradients.keys() == trained
    assert all(p.grad is None for p in adapter.parameters() if not p.requires_grad)
    state = build_optimizers(adapter.named_model_parameters(), rules, cfg, adapter.width).state_dict()
    assert state["state"].keys() == trained


def test_nothing_left_to_train_is_refused():
    with pytest.raises(
        ValueError, match="base_model_lr, memory_lr: at 0 nothing of this model is left to train"
    ):
        made("base_model_lr=0", "memory_lr=0")
    cfg, model_cfg = config("gpt2", "base_model_lr=0")
    with pytest.raises(ValueError, match="base_model_lr: at 0 nothing .* Nearest: base_model_lr=null"):
        build_adapter(cfg, model_cfg, Letters())
    cfg, model_cfg = config("gpt2")
    adapter = build_adapter(cfg, model_cfg, Letters())
    with pytest.raises(ValueError, match="lora_lr: at 0 nothing"):
        attach(adapter, cfg.model_copy(update={"use_lora": True, "lora_lr": 0.0}), base="b")


def counted(*words):
    """Operations per token of a step, as they are counted; planned ones."""
    adapter, _ = made(*words, "model_cfg.vocab_size=128")  # no row of the head is padding
    # In front of the first block gradients are otherwise not needed: the formula has them go all the way.
    adapter.model.embed_tokens.register_forward_hook(
        lambda module, given, x: x + torch.zeros(1).requires_grad_()
    )
    prepared = adapter.prepare(batch_for(adapter, 4, LENGTH), context(4))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        weighted_loss(adapter(prepared).terms, prepared.denominators).backward()
    return counter.get_total_flops() / (4 * LENGTH), adapter.cost(LENGTH)


@pytest.mark.parametrize(
    "words", [["base_model_lr=0"], ["memory_lr=0", "memory_bank_lr=0.1"], ["memory_bank_lr=0"]]
)
def test_a_weight_without_gradient_costs_4_operations(words):
    (all_, plan), (found, cost) = counted(), counted(*words)
    assert cost.forward_per_token == plan.forward_per_token
    assert plan.training_per_token - cost.training_per_token == pytest.approx(all_ - found, rel=0.01)
    assert found < all_


def test_a_run_on_a_base_that_stays(tmp_path):
    """What stays is in the checkpoint, as it is nowhere else, and in neither the optimizer's state nor the average."""
    words = [*SHORT, "base_model_lr=0", "memory_lr=0.01", "memory_bank_lr=0.05", "ema_decay=0.5"]
    cfg, model_cfg = of(*words)
    before = {
        n: t.clone() for n, t in build_adapter(cfg, model_cfg, ByteTokenizer()).model.state_dict().items()
    }
    train(cfg, model_cfg, tmp_path)
    after = load_tensors(tmp_path, "model.pt")
    moved = {name for name in after if name.startswith(("memory.", "bank."))}
    kept = restore(tmp_path, raw=True).adapter.model.state_dict()
    assert moved and after.keys() == kept.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, kept[name])
        assert torch.equal(value, before[name]) == (name not in moved), name
    assert load_tensors(tmp_path, "ema.pt")["shadow"].keys() == moved
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    trained = {r["role"]: r["lr"] for r in manifest["roles"] if r["optimizer"] != "frozen"}
    assert trained == {"memory": 0.01, "memory_bank": 0.05}
    assert manifest["parameters"]["by_role"].keys() >= {"memory", "memory_bank", "matrix"}


@pytest.mark.on_cpu("bit for bit is promised there alone")
def test_a_run_on_a_base_that_stays_goes_on_exactly(tmp_path):
    words = [*SHORT, "base_model_lr=0", "memory_lr=0.01", "ema_decay=0.5", "save_steps=1"]
    cfg, model_cfg = of(*words)
    whole, again = tmp_path / "whole", tmp_path / "again"
    score = train(cfg, model_cfg, whole)
    shutil.copytree(whole / "checkpoint-1", again / "checkpoint-1")
    assert train(cfg.model_copy(update={"resume": "auto"}), model_cfg, again) == score
    assert_same_state(whole / "checkpoint-2", again / "checkpoint-2")
