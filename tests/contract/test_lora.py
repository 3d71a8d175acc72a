"""Adapters beside the weights of any architecture."""

import shutil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adapters.base import weighted_loss
from adapters.lora import attach, merge
from models.layers.recompute import recomputing
from models.layers.roles import rule_for
from tests.contract.test_run import assert_same_state
from tests.contract.tiny import (
    HARD,
    SHORT,
    STEPS,
    adapter_of,
    batch_for,
    config,
    context,
    device,
    loss_and_gradients,
    move_away_from_uniform,
)
from trainer.loop import train
from trainer.run.checkpoint import load_tensors
from trainer.run.restore import restore

LENGTH = 32


def adapted(architecture, *more, b_std=0.0, **sizes):
    """An adapter of an architecture with LoRA, and numbers in B."""
    cfg, model_cfg = config(architecture)
    has_dropout = "dropout" in type(model_cfg).model_fields  # which is drawn anew in every pass
    adapter = adapter_of(architecture, *(["model_cfg.dropout=0"] if has_dropout else []), **sizes)
    move_away_from_uniform(adapter, 0.1)
    fields = {"use_lora": True, "lora_rank": 2, "lora_dropout": 0.0, **dict(more)}
    if not adapter.lora_targets:  # it says nothing of them, as is allowed
        fields = {**fields, "lora_targets": "all-linear"}
    attach(adapter, cfg.model_copy(update=fields), base="b")
    with torch.no_grad():
        for name, p in adapter.named_model_parameters():
            if "lora_B" in name:
                p.copy_(b_std * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return adapter


def score(adapter):
    adapter.eval()
    with torch.no_grad():
        return adapter.likelihood(batch_for(adapter), context(phase="eval")).nats


def test_adapters_begin_at_the_base_and_alone_have_gradients(architecture):
    plain = adapter_of(architecture)
    move_away_from_uniform(plain, 0.1)
    base, _ = loss_and_gradients(plain.eval(), [batch_for(plain)])
    adapter = adapted(architecture).eval()
    losses_, gradients = loss_and_gradients(adapter, [batch_for(adapter)])
    assert losses_ == pytest.approx(base, rel=1e-6)
    trained = {name for name, p in adapter.named_model_parameters() if p.requires_grad}
    assert (
        gradients.keys() == trained == set(adapter.trained_state()) - set(dict(adapter.model.named_buffers()))
    )
    beside = {name for name in trained if "lora_" not in name}
    assert trained > beside == adapter.beside(), "and a memory, which adapters leave to be trained"


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_merged_weights_say_what_adapters_said(architecture, targets):
    plain = score(adapted(architecture, ("lora_targets", targets)))
    adapter = adapted(architecture, ("lora_targets", targets), b_std=0.5)
    beside = score(adapter)
    merge(adapter)
    assert not any("lora_" in name for name in adapter.model.state_dict())
    rtol = 3e-5 if adapter.device.type == "cpu" else 3e-3  # products in TF32, as of runs in fp32
    torch.testing.assert_close(score(adapter), beside, rtol=rtol, atol=0)
    assert not torch.allclose(beside, plain, rtol=1e-4), "adapters act"


def test_flops_of_weights_without_gradients(architecture):
    adapter = adapted(architecture, vocabulary=128)  # padded columns are not multiplied
    # In front of the first block gradients are otherwise not needed; those of a table that is the output layer too are.
    tied = 0
    for name, p in adapter.named_model_parameters():
        if rule_for(adapter.param_roles(), name).role == "embedding":
            p.requires_grad_(True)
            tied += p.numel() * (p is getattr(adapter.model, "head_weight", None))
    ctx = context(16)
    adapter.on_step_start(ctx, 1)
    prepared = adapter.prepare(batch_for(adapter, 16, LENGTH), ctx).to(device())
    adapter(prepared)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = adapter(prepared)
        weighted_loss(output.terms, prepared.denominators).backward()
    plan, cost = adapter.flops(LENGTH), adapter.cost(LENGTH)
    expected = cost.reference.training_per_token + 2 * tied
    if output.flops is not None:
        expected *= float(output.flops) / (16 * LENGTH) / plan.training_per_token
        assert float(adapter.realised(output.flops, LENGTH)) / (16 * LENGTH) * (
            (cost.reference.training_per_token + 2 * tied) / cost.training_per_token
        ) == pytest.approx(expected)
    assert expected == pytest.approx(counter.get_total_flops() / (16 * LENGTH), rel=0.07)
    assert cost.training_per_token < plan.training_per_token, "a weight that stays costs 4, not 6"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["compiled", "recomputed"])
def test_blocks_carry_adapters_however_they_run(architecture, way):
    """Behind a base without gradients, deep layers too."""
    torch._dynamo.reset()  # other tests have compiled the same code, for other classes
    # In fp64: what recurs many times, with weights as large as these, magnifies rounding.
    plain, adapter = (adapted(architecture, b_std=0.3).double() for _ in range(2))
    _, expected = loss_and_gradients(plain, [batch_for(plain)])
    for path in adapter.blocks():
        block = adapter.model.get_submodule(path)
        if way == "compiled":
            block.compile(backend="aot_eager", fullgraph=True)
        else:
            block.forward = recomputing(block)
    _, found = loss_and_gradients(adapter, [batch_for(adapter)])
    assert found.keys() == expected.keys() and all(gradient.any() for gradient in found.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-3 * gradient.norm(), name


@pytest.mark.on_cpu("bit for bit is promised there alone")
@pytest.mark.slow
def test_a_run_with_adapters_goes_on_exactly(whole_run, architecture, tmp_path):
    base, _ = whole_run
    words = [*HARD, *SHORT, "use_lora=true", f"init_from_checkpoint={base}", "lora_rank=2"]
    cfg, model_cfg = config(architecture, *words)
    run, again = tmp_path / "run", tmp_path / "again"
    score_of_run = train(cfg, model_cfg, run)
    shutil.copytree(run / "checkpoint-2", again / "checkpoint-2")
    assert train(cfg.model_copy(update={"resume": "auto"}), model_cfg, again) == score_of_run
    assert_same_state(run / f"checkpoint-{STEPS}", again / f"checkpoint-{STEPS}")
    found = restore(run)
    assert found.adapter.low_rank
    left = dict(load_tensors(run / f"checkpoint-{STEPS}", "model.pt"))
    kept = found.adapter.beside() | set(dict(found.adapter.model.named_buffers()))
    assert {name for name in left if "lora_" not in name} <= kept
