"""Losses that keep experts busy, what is reported of their load, and the bias that is moved by it."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from adapters import build_adapter
from adapters.experts import load_figures
from data.tokenizers import ByteTokenizer
from tests.contract.pair import Pair, train_here
from tests.contract.test_run import assert_same_state
from tests.contract.tiny import (
    adapter_of,
    batch_for,
    config,
    context,
    loss_and_gradients,
    session_of,
    split,
    train_on,
)
from trainer.distributed import World
from trainer.loop import train
from trainer.meter import Meter

DEEPSEEK = (
    *("model_cfg.gate_type=deepseek_v3", "model_cfg.top_k=2", "model_cfg.first_k_dense=0"),
    *("model_cfg.bias_update_speed=0.01", "model_cfg.bias_freeze_frac=0.0"),
)
CPU = torch.device("cpu")
NOT_SKIPPED = torch.zeros(())


def biases(adapter) -> list[torch.Tensor]:
    return [layer.gate.e_score_correction_bias for layer in adapter.layers]


def stepped(adapter, parts, step=0, total=100, skipped=NOT_SKIPPED):
    """A step's forwards and hooks, without an optimizer."""
    adapter.train().on_step_start(context(step=step), total)
    outputs = [adapter(adapter.prepare(part, context(step=step))) for part in parts]
    adapter.after_step(step, skipped)
    return outputs


# -- terms -------------------------------------------------------------------------------------------------------


def test_terms_are_weighted_as_they_are_minimised_and_metrics_are_not():
    adapter = adapter_of("moe", "model_cfg.alphas=[0.5,0.0]", "model_cfg.alpha=null", "model_cfg.beta=0.25")
    batch = batch_for(adapter)
    prepared = adapter.prepare(batch, context())
    output, told = adapter(prepared), adapter.hidden(prepared).extra
    assert prepared.denominators["rows"] == 4 and prepared.denominators["positions"] == 4 * 32
    torch.testing.assert_close(output.terms["balance"].sum, 0.5 * told["balance"][0].sum() / 2)
    torch.testing.assert_close(output.terms["router_z"].sum, 0.25 * told["router_z"].sum() / 2)
    assert not any(output.terms[name].likelihood for name in ("balance", "router_z"))
    metric = output.metrics["balance"]
    assert float(metric.sum) / metric.count == pytest.approx(float(told["balance"].detach().mean()), rel=1e-5)
    assert float(output.metrics["dropped_assignments"].sum) == 0


def test_losses_are_added_to_what_is_minimised():
    """Gates hear of the balance: with and without it their gradients differ, and by no more than it says."""
    gradients = []
    for weight in (0.0, 1.0):
        adapter = adapter_of("moe", f"model_cfg.alpha={weight}", "model_cfg.beta=0.0", dtype=torch.float64)
        gradients.append(loss_and_gradients(adapter, [batch_for(adapter)])[1])
    prepared = adapter.prepare(batch_for(adapter), context())
    gate = adapter.layers[0].gate.weight
    (alone,) = torch.autograd.grad(adapter.hidden(prepared).extra["balance"].mean(), gate)
    name = "layers.0.mlp.gate.weight"
    torch.testing.assert_close(gradients[1][name] - gradients[0][name], alone, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("words", [DEEPSEEK, ("model_cfg.jitter_noise=0.1",)], ids=["deepseek_v3", "jitter"])
def test_splitting_a_batch_changes_nothing(words):
    adapter = adapter_of("moe", *words, dtype=torch.float64)
    batch = batch_for(adapter)
    whole, parts = (loss_and_gradients(adapter.train(), split(batch, sizes)) for sizes in ([4], [1, 3]))
    assert parts[0] == pytest.approx(whole[0], rel=1e-9)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, rtol=1e-7, atol=1e-12, msg=name)


def test_the_published_balance_says_that_splitting_changes_it():
    adapter = adapter_of("moe", "model_cfg.balance_over=micro_batch", dtype=torch.float64)
    assert "balance_over" in adapter.depends_on_split and not adapter_of("moe").depends_on_split
    batch = batch_for(adapter)
    whole, parts = (loss_and_gradients(adapter, split(batch, sizes))[0] for sizes in ([4], [1, 3]))
    assert abs(parts["balance"] / whole["balance"] - 1) > 1e-3 and parts["ce"] == pytest.approx(whole["ce"])


def test_scores_hold_nothing_but_the_text():
    adapters = [adapter_of("moe", f"model_cfg.alpha={w}", "model_cfg.jitter_noise=0.1") for w in (0.0, 1.0)]
    batch, ctx = batch_for(adapters[0]), context(phase="eval")
    first, again = (adapters[0].eval().likelihood(batch, ctx).nats for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first, adapters[1].eval().likelihood(batch, ctx).nats)


def test_a_model_without_experts_is_trained_as_ever():
    words = ("model_adapter=adapters.experts:ExpertsAdapter",)
    plain, other = adapter_of("vanilla"), adapter_of("vanilla", *words)
    assert type(other).__name__ == "ExpertsAdapter" and not other.depends_on_split
    expected, found = (loss_and_gradients(a, [batch_for(a)]) for a in (plain, other))
    assert found[0] == expected[0]
    other.after_step(0, NOT_SKIPPED)


# -- what is reported ----------------------------------------------------------------------------------------------


def test_figures_of_a_load():
    load = torch.tensor([[4.0, 4.0, 4.0, 4.0], [0.0, 0.0, 12.0, 4.0]])
    found = load_figures(load)
    assert found["load_max_over_mean"] == (1 + 3) / 2 and found["load_max_over_mean_worst"] == 3
    assert found["dead_experts"] == 2
    assert [found[f"expert_{e}"] for e in range(4)] == [0.5, 0.5, 2.0, 1.0]


def test_one_micro_batch_and_four_are_reported_alike():
    read = []
    for sizes in ([4], [1, 1, 1, 1]):
        adapter, meter = adapter_of("moe", dtype=torch.float64), Meter(CPU)
        parts = split(batch_for(adapter), sizes)
        for output in stepped(adapter, parts):
            meter.add_output(output)
        meter.add_step({"tokens": 128.0, "rows": 4.0, "positions": 128.0}, 128, 128)
        read.append(meter.read(World(CPU)))
    assert read[0] == pytest.approx(read[1]) and read[0]["load_max_over_mean"] > 1
    assert read[0]["dropped_assignments"] == 0 and "load" not in read[0]


# -- the bias ------------------------------------------------------------------------------------------------------


def test_the_bias_moves_towards_the_mean_load_of_all_micro_batches():
    adapter = adapter_of("moe", *DEEPSEEK)
    stepped(adapter, split(batch_for(adapter), [1, 3]))
    whole = adapter_of("moe", *DEEPSEEK)
    prepared = whole.prepare(batch_for(whole), context())
    load = whole.hidden(prepared).extra["load"].sum(1).double()  # (L, E)
    for bias, counted in zip(biases(adapter), load, strict=True):
        torch.testing.assert_close(bias, 0.01 * (counted.mean() - counted).sign().float())
    assert any(bias.any() for bias in biases(adapter))


def test_it_is_moved_in_place():
    """What a checkpoint or another process holds of it is the bias itself."""
    adapter = adapter_of("moe", *DEEPSEEK)
    held = adapter.trained_state()["layers.0.mlp.gate.e_score_correction_bias"]
    for step in range(3):
        stepped(adapter, [batch_for(adapter, seed=step)], step)
    assert held.any() and held.data_ptr() == biases(adapter)[0].data_ptr()


def test_other_processes_count_too_and_local_counts_stay():
    """As two processes with 3 and 1 rows: the same bias as one of 4, and what was counted here is left as it was."""
    one, two = adapter_of("moe", *DEEPSEEK), adapter_of("moe", *DEEPSEEK)
    batch = batch_for(one)
    mine, others = split(batch, [3, 1])
    stepped(one, [batch])
    elsewhere = two.hidden(two.prepare(others, context())).extra["load"].sum(1)
    two.add_up = lambda load: load + elsewhere
    stepped(two, [mine])
    assert int(two.load.sum()) == 2 * 3 * 32 * 2
    assert all(torch.equal(a, b) for a, b in zip(biases(one), biases(two), strict=True))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ((), {"skipped": torch.ones(())}),
        (("model_cfg.bias_freeze_frac=0.5",), {"step": 50}),
        (("model_cfg.bias_update_speed=0.0",), {}),
    ],
    ids=["skipped", "frozen at the end", "switched off"],
)
def test_it_stays_where_the_step_is(words, options):
    adapter = adapter_of("moe", *DEEPSEEK, *words)
    stepped(adapter, [batch_for(adapter)], **options)
    assert not any(bias.any() for bias in biases(adapter))
    if "step" in options:
        stepped(adapter, [batch_for(adapter)], options["step"] - 1)
        assert any(bias.any() for bias in biases(adapter))


def test_scores_and_gradients_leave_it():
    adapter = adapter_of("moe", *DEEPSEEK)
    adapter.eval().likelihood(batch_for(adapter), context(phase="eval"))
    adapter.after_step(0, NOT_SKIPPED)
    loss_and_gradients(adapter.train(), [batch_for(adapter)])
    assert not any(bias.any() or bias.requires_grad for bias in biases(adapter))


def test_recomputed_activations_are_counted_once():
    found = []
    for more in ((), ("gradient_checkpointing=true",)):
        session = session_of("moe", *DEEPSEEK, *more)
        train_on(session, batch_for(session.adapter), range(2), total=10)
        found.append([session.adapter.load, *biases(session.adapter)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert int(found[0][0].sum()) == 2 * 4 * 32 * 2


def test_it_evens_out_a_skew_without_a_gradient():
    """Scores that favour some experts: the bias alone brings the busiest below 1.2 of the mean."""
    adapter = adapter_of("moe", *DEEPSEEK)
    gate = adapter.layers[0].gate
    generator = torch.Generator().manual_seed(0)
    skew = torch.tensor([1.0, 0.3, -0.3, -1.0])
    for step in range(2000):
        logits = skew + 0.5 * torch.randn(512, 4, generator=generator)
        load = torch.bincount(gate.choose(logits).experts.flatten(), minlength=4)
        if step == 0:
            assert load.max() / load.float().mean() > 1.7
        if load.max() / load.float().mean() < 1.2:
            return
        gate.balance(load, 0.001, NOT_SKIPPED)
    raise AssertionError(f"after 2000 steps the loads are {load.tolist()}")


@pytest.mark.slow
def test_a_run_goes_on_with_its_bias_and_two_processes_have_one(tmp_path):
    saved = ["ema_decay=0.9", "save_steps=2", "save_total_limit=null"]
    words = [*DEEPSEEK, *saved, "optimizer=sgd", "learning_rate=0.1"]
    whole, again, two = (tmp_path / name for name in ("whole", "again", "two"))
    train(*config("moe", *words), whole)
    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", again / "metrics.jsonl")
    cfg, model_cfg = config("moe", *words)
    train(cfg.model_copy(update={"resume": "auto"}), model_cfg, again)
    assert_same_state(whole / "checkpoint-6", again / "checkpoint-6")
    with Pair() as pair:
        (_, first), (_, second) = pair.ask(train_here, "moe", words, two)
    name = "layers.0.mlp.gate.e_score_correction_bias"
    alone = torch.load(whole / "checkpoint-6" / "model.pt", weights_only=True)[name]
    assert alone.any()
    assert torch.equal(torch.from_numpy(first[name]), alone) and (first[name] == second[name]).all()


# -- what is drawn -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("words", [(), (*DEEPSEEK, "model_cfg.first_k_dense=1"), ("model_cfg.moe_every=2",)])
def test_the_experts_that_are_drawn_are_those_that_tokens_use(words):
    """Against the outputs of single experts, weighed and added up anew."""
    cfg = config("moe", "model_cfg.vocab_size=null", "model_cfg.n_shared_experts=0", *words)
    adapter, text = build_adapter(*cfg, ByteTokenizer()).eval(), "whose is \0 which?"
    through = {}
    blocks = adapter.model_cfg.expert_layers
    for block, layer in zip(blocks, adapter.layers, strict=True):
        layer.gate.weight.mul_(50)  # at their first values all experts weigh alike
        layer.register_forward_hook(lambda m, x, y, block=block: through.update({block: (x[0][0], y[0][0])}))
    found = adapter.annotate(text)
    assert [one.name for one in found.spans] == [f"layer {b}: expert that weighs most" for b in blocks]
    assert [of.name for of in found.maps] == [f"layer {b}: weights of experts" for b in blocks]
    for block, layer, one, of in zip(blocks, adapter.layers, found.spans, found.maps, strict=True):
        x, y = (t[1:] for t in through[block])  # (L, D): without the start token
        assert of.values.shape == (adapter.model_cfg.experts, len(text)) and one.spans[-1].end == len(text)
        assert (of.values > 0).sum(0).unique().tolist() == [adapter.model_cfg.chosen]
        e = layer.experts
        alone = torch.stack(
            [
                (F.silu(x @ g.T) * (x @ u.T)) @ d.T
                for g, u, d in zip(e.gate_proj, e.up_proj, e.down_proj, strict=True)
            ]
        )  # (E, L, D)
        torch.testing.assert_close((of.values[..., None] * alone).sum(0), y, rtol=1e-4, atol=1e-6)
        assert [span.label for span in one.spans] == [str(int(w.argmax())) for w in of.values.T]
